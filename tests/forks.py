"""The command line, forked from a process that has imported all of it: what a start takes is then its own work alone.

Nothing else is shared: environment, folder, output and signals are of the process itself. This module is imported
there, too, and so must not import what tests do.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from realtime_bridge.cli import main

PRELOADED = [
    __name__,
    "realtime_bridge.server",
    "realtime_bridge.sources.postgres",
    "realtime_bridge.sources.supabase",
    "realtime_bridge.transports.uvicorn_protocol",
]


def fork(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: str,
    log: Path,
    plant: Callable[[], None] | None = None,
) -> ForkServerProcess:
    """Run `realtime-bridge` in a folder, its output appended to a log. `plant` is called there before it begins."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    words = ["realtime-bridge", *arguments]
    process = context.Process(target=_run, args=(words, dict(environment), folder, log, plant))
    process.start()
    return process


def _run(
    arguments: list[str], environment: dict[str, str], folder: str, log: Path, plant: Callable[[], None] | None
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.close(output)
    sys.argv = arguments
    if plant is not None:
        plant()
    main()
