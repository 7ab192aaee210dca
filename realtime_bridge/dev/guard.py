"""The guard: a small program that cleans up after a process that can no longer do so itself.

It makes a temporary folder, tells its name, and waits on a pipe that only its parent holds open. When the pipe closes,
because the block was left or because the parent is dead, it kills every process whose working directory is inside the
folder and removes the folder. So there is one way to clean up, it is used every time, and nobody has to keep a list of
process ids: a server's children count because they work where it works. (PR_SET_PDEATHSIG was refused: it follows the
*thread* that started the server, and reaches no grandchildren.)

Run by its path, so that it starts in 30 ms: the standard library only.

Layer: whole (dev). May import: nothing of this package.
Sources: proc(5), `/proc/<pid>/cwd`; lsof(8), "output for other programs"; Postgres' `AddToDataDirLockFile` for line 7
of postmaster.pid.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CLEAR_SECONDS = 10.0
_POLL_SECONDS = 0.005
_IPC_RMID = 0
_PREFIX = "realtime-bridge-"


def inhabitants(folder: Path) -> list[int]:
    """Process ids of all whose working directory is the folder or lies in it, even when the folder is gone already."""
    prefix = f"{folder}/"
    return [
        pid
        for pid, directory in _working_directories()
        if f"{directory.removesuffix(' (deleted)')}/".startswith(prefix)
    ]


def _working_directories() -> Iterator[tuple[int, str]]:
    if not Path("/proc/self/cwd").exists():
        yield from _listed_working_directories()
        return
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile, or belongs to someone else
                yield int(entry.name), os.readlink(f"{entry.path}/cwd")  # noqa: PTH115  a deleted one is no path


def _listed_working_directories() -> Iterator[tuple[int, str]]:
    """The same where there is no /proc, as on macOS."""
    listing = subprocess.run(["lsof", "-w", "-d", "cwd", "-Fn"], stdout=subprocess.PIPE, text=True, check=False)  # noqa: S607
    pid = 0
    for line in listing.stdout.splitlines():
        if line.startswith("p"):
            pid = int(line[1:])
        elif line.startswith("n"):
            yield pid, line[1:]


def signal_all(folder: Path, number: signal.Signals) -> list[int]:
    """Send a signal to whoever works in the folder, and say who that was."""
    pids = inhabitants(folder)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return pids


def clear(folder: Path) -> None:
    """Kill whoever works in the folder and remove it; gives up after ten seconds on what cannot be killed."""
    assert folder.name.startswith(_PREFIX), folder
    deadline = time.monotonic() + CLEAR_SECONDS
    while time.monotonic() < deadline:
        if signal_all(folder, signal.SIGKILL):
            time.sleep(_POLL_SECONDS)
        elif folder.exists():
            _release_shared_memory(folder)
            shutil.rmtree(folder, ignore_errors=True)
        else:  # gone, and nobody was in it after that: who comes too late can no longer enter it
            return


def _release_shared_memory(folder: Path) -> None:
    """Free the one thing that a killed Postgres leaves outside its folder: a System V segment of a few bytes."""
    for lock_file in folder.glob("*/postmaster.pid"):
        lines = lock_file.read_text().splitlines()
        if len(lines) > 6 and lines[6].split():
            ctypes.CDLL(None).shmctl(int(lines[6].split()[-1]), _IPC_RMID, None)


def watch(parent: str) -> None:
    """Make a folder in `parent`, print its name, and clear it once standard input is at its end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent)).resolve()
    try:
        os.write(1, os.fsencode(folder))
        os.close(1)
        os.read(0, 1)  # returns when the last holder of the other end has gone
    finally:
        clear(folder)


if __name__ == "__main__":
    watch(sys.argv[1])
