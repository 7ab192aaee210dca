"""However the parent ends, no server process, no guard and no folder outlives it."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from realtime_bridge.dev.engines import EmbeddedValkey
from tests.services import eventually, running

pytestmark = [pytest.mark.integration, pytest.mark.fault]

PARENT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
from realtime_bridge.dev.engines import EmbeddedPostgres, EmbeddedValkey
with EmbeddedPostgres() as postgres, EmbeddedValkey(durable=True) as valkey:
    if "frozen" in sys.argv:
        postgres.freeze()
        valkey.freeze()
    (postgres.directory / "data" / "all-is-up").touch()
    time.sleep(600)
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder for temporary folders that the servers' user can reach."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name).resolve()
        path.chmod(0o755)
        yield path


@contextmanager
def parent_of_servers(home: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "TMPDIR": str(home)}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    ) as parent:
        try:
            yield parent
        finally:
            parent.kill()


def processes_of(home: Path) -> dict[int, str]:
    """Command lines that name the folder: the guards' and the servers'; a zombie has none."""
    found: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command, directory = path.read_text(errors="replace"), str(path.with_name("cwd").readlink())
        except OSError:
            continue
        if str(home) in command + directory:
            found[int(path.parent.name)] = command.replace("\0", " ")
    return found


def shared_memory_segments() -> set[str]:
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


async def nothing_is_left(home: Path) -> None:
    try:
        await eventually(lambda: not processes_of(home) and not list(home.iterdir()), timeout=20)
    except AssertionError as error:
        raise AssertionError(f"left: {processes_of(home)}, {list(home.rglob('*'))[:10]}") from error


@pytest.mark.parametrize("moment", ["", "/data", "/data/base", "/data/postmaster.pid", "/data/all-is-up"])
async def test_kill_9_of_the_parent_at_any_moment_leaves_nothing(home: Path, moment: str) -> None:
    """From the first folder of ours on: before it, Python itself tries with a file of its own where folders can be."""
    with parent_of_servers(home) as parent:
        await eventually(lambda: list(home.glob(f"realtime-bridge-*{moment}")), timeout=30)
        parent.kill()
    await nothing_is_left(home)


async def test_frozen_servers_die_too(home: Path) -> None:
    with parent_of_servers(home, "frozen") as parent:
        await eventually(lambda: list(home.glob("*/data/all-is-up")), timeout=30)
        parent.kill()
    await nothing_is_left(home)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
async def test_a_signal_to_the_whole_process_group_leaves_nothing(home: Path, number: signal.Signals) -> None:
    with parent_of_servers(home) as parent:
        await eventually(lambda: list(home.glob("*/data/all-is-up")), timeout=30)
        os.killpg(parent.pid, number)
        parent.wait()
    await nothing_is_left(home)


async def test_a_killed_postgres_leaves_no_shared_memory(home: Path) -> None:
    with parent_of_servers(home) as parent:
        [mark] = await eventually(lambda: list(home.glob("*/data/all-is-up")), timeout=30)
        segment = mark.with_name("postmaster.pid").read_text().splitlines()[6].split()[-1]
        assert segment in shared_memory_segments()
        parent.kill()
    await nothing_is_left(home)
    assert segment not in shared_memory_segments()


async def test_without_its_guard_a_server_still_ends_with_its_block(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    with running(EmbeddedValkey()) as server:
        server._folder._guard.kill()
    assert not processes_of(home)
    assert not server.directory.exists()
