"""However `realtime-bridge dev` ends, nothing of it is left; and it ends when a part of it dies, and says which."""

import os
import signal

import pytest

from tests.demos import Demo, processes_of
from tests.services import eventually

pytestmark = [pytest.mark.integration, pytest.mark.fault]


def process_of(demo: Demo, command: str) -> int:
    """The one process whose command line has this in it."""
    [pid] = [pid for pid, line in processes_of(demo.home).items() if command in line]
    return pid


@pytest.mark.parametrize("moment", ["initdb", "bin/postgres", "dev.app"])
async def test_kill_9_while_it_starts_leaves_nothing(moment: str) -> None:
    with Demo() as demo:
        await eventually(lambda: any(moment in line for line in processes_of(demo.home).values()), timeout=30)
        demo.signal(signal.SIGKILL)
        await eventually(demo.leaves_nothing, timeout=20)


async def test_kill_9_of_all_its_parts_together_leaves_nothing() -> None:
    with Demo("--redis") as demo:
        await demo.ready()
        assert sum("dev.app" in line for line in processes_of(demo.home).values()) == 2
        demo.signal(signal.SIGKILL)
        await eventually(demo.leaves_nothing, timeout=20)


@pytest.mark.parametrize(
    ("arguments", "part", "told"),
    [
        ((), "dev.app", "the bridge on port"),
        (("--source", "supabase"), "bin/postgres", "Postgres has ended"),
        (("--redis",), "valkey-server", "Valkey has ended"),
    ],
    ids=["bridge", "postgres", "valkey"],
)
async def test_it_ends_with_a_part_that_dies_and_says_which(arguments: tuple[str, ...], part: str, told: str) -> None:
    with Demo(*arguments) as demo:
        await demo.ready()
        os.kill(process_of(demo, part), signal.SIGKILL)
        assert await demo.ended() == 1
        assert told in demo.errors
        assert "Traceback" not in demo.errors
        assert demo.leaves_nothing()
