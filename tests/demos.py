"""`realtime-bridge dev` as a person runs it, in a process and a folder of its own, and what is left of it."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from tests.services import eventually

FOREIGN = {
    "BRIDGE_NO_SUCH_SETTING": "1",
    "BRIDGE_TABLES": "public.nothing",
    "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing",
    "REDIS_URL": "redis://127.0.0.1:1",
    "SUPABASE_URL": "http://127.0.0.1:1",
    "PGSSLMODE": "require",
    "HTTP_PROXY": "http://127.0.0.1:1",
}
"""What a developer may have set for a real bridge: none of it is for the demo."""


@contextmanager
def fresh_home() -> Iterator[Path]:
    """A folder for temporary folders that the servers' user can reach."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name).resolve()
        path.chmod(0o755)
        yield path


def processes_of(home: Path) -> dict[int, str]:
    """Command lines of guards and of what they guard, by process id; a zombie has none."""
    found: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command, directory = path.read_text(errors="replace"), str(path.with_name("cwd").readlink())
        except OSError:
            continue
        if str(home) in command + directory:
            found[int(path.parent.name)] = command.replace("\0", " ")
    return found


class Demo:
    """One run. Leave the block with nothing of it running.

    Attributes:
        home: where its temporary folders are; empty again when it has cleaned up.
    """

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments

    def __enter__(self) -> "Demo":
        self._folder = fresh_home()
        self.home = self._folder.__enter__()
        self._output, self._errors = self.home.with_suffix(".out"), self.home.with_suffix(".err")
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "realtime_bridge", "dev", "--print-env", "--port", "0", *self._arguments],
                env={**os.environ, **FOREIGN, "TMPDIR": str(self.home)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self._process.kill()
        self._process.wait()
        wait_for_guards = time.monotonic() + 20
        while processes_of(self.home) and time.monotonic() < wait_for_guards:
            time.sleep(0.05)
        self._folder.__exit__(None, None, None)
        if kind is not None:
            sys.stderr.write(f"--- standard error of the demo ---\n{self.errors[-8000:]}\n")
        self._output.unlink()
        self._errors.unlink()

    @property
    def output(self) -> str:
        """Its standard output."""
        return self._output.read_text()

    @property
    def errors(self) -> str:
        """Its standard error."""
        return self._errors.read_text()

    async def ready(self) -> Any:
        """Wait for what it prints when it is ready."""

        def is_ready() -> bool:
            assert self._process.poll() is None, self.errors
            return self.output.endswith("\n")

        await eventually(is_ready, timeout=40)
        return orjson.loads(self.output)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def ended(self, timeout: float = 20) -> int:
        """Wait for its end; the exit status."""
        return await asyncio.to_thread(self._process.wait, timeout)

    def leaves_nothing(self) -> bool:
        """Whether no process and no file of it is left."""
        return not processes_of(self.home) and not list(self.home.iterdir())
