"""`make chaos`: one fault after the other, and after each of them everything is compared and judged.

Ends with the times that were needed, or, at the first violation, with what is wrong. The same seed gives the same
faults in the same order, and the same wishes of writer and clients; not the same moments.
"""

import argparse
import asyncio
import random
import signal
import time
from collections.abc import Sequence

# What a bridge is forked from does not import this module, and so may the rest be imported here.
from tests.oracle.chaos import chaos
from tests.oracle.faults import FAULTS, Fault, schedule
from tests.oracle.stage import stage
from tests.oracle.times import Times, table


def main() -> int:
    """Exit status 1 if something was wrong."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long to go on")
    parser.add_argument("--seed", type=int, help="of faults, writer and clients")
    parser.add_argument("--only", default="", help="words that the names of all faults have to have")
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    chosen = [fault for fault in FAULTS if options.only in fault.name]
    print(f"seed {seed}", flush=True)
    if not chosen:
        parser.error(f"--only: none of {', '.join(fault.name for fault in FAULTS)}")
    try:
        return asyncio.run(_play(seed, options.minutes * 60, chosen))
    except (asyncio.CancelledError, KeyboardInterrupt):
        return 130


async def _play(seed: int, seconds: float, faults: Sequence[Fault]) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # everything is stopped on the way out
    measured: list[tuple[str, Times]] = []
    began = time.monotonic()
    async with stage(seed) as it:
        async for name, times in chaos(it, schedule(seed, faults), seconds):
            measured.append((name, times))
            print(f"{time.monotonic() - began:6.0f} s  {name}: {times}", flush=True)
        print(f"\n{table(measured)}\n\nresumed: {dict(it.resumed)}", flush=True)
        if it.judge.violations:
            print(f"\n{it.report()}", flush=True)
    return 1 if it.judge.violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
