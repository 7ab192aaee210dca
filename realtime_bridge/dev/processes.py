"""Servers and folders that do not outlive the process that made them, not even when it is killed.

A `GuardedFolder` has a guard, a process of its own that clears it; an `EmbeddedServer` is a program that runs in one.

Layer: whole (dev). May import: errors, dev.guard.
Sources: ip(7) and socket(7) for SO_REUSEADDR on Linux.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Self

from realtime_bridge.dev import guard
from realtime_bridge.dev.guard import clear, signal_all
from realtime_bridge.errors import UnavailableError

NOBODY = 65534
START_SECONDS = 30.0
STOP_SECONDS = 10.0
_POLL_SECONDS = 0.005


class ServerDiedError(UnavailableError):
    """A program ended at once or was not ready in time; the message holds the end of its log."""


class GuardedFolder:
    """A temporary folder that vanishes with this process, and with it every process that works in it.

    Args:
        unprivileged: give the folder, and what is spawned in it, to `nobody` if we are root. For servers that refuse
            to run as root.
    """

    def __init__(self, *, unprivileged: bool = False) -> None:
        self.drops_privileges = unprivileged and os.geteuid() == 0

    def __enter__(self) -> Self:
        parent = Path(tempfile.gettempdir())
        if self.drops_privileges and not readable_by_others(parent):
            parent = Path("/tmp")  # noqa: S108  the folder in it is made by mkdtemp
        self._guard = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", guard.__file__, str(parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # Ctrl-C and the death of a process group must not reach it
        )
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        with self._guard.stdout as answer:
            self.path = Path(os.fsdecode(answer.read()))
        if not self.path.is_absolute():
            self._guard.stdin.close()
            self._guard.wait()
            raise ServerDiedError(f"no temporary folder could be made in {parent}")
        if self.drops_privileges:
            os.chown(self.path, NOBODY, NOBODY)
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        if self._guard.wait() != 0:  # someone has killed the guard
            clear(self.path)

    def spawn(self, command: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
        """Start a program in this folder, its output appended to `log`, deaf to the terminal's signals."""
        with log.open("ab") as output:
            return subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.path,
                env={**_neutral_environment(), "TZ": "UTC"},
                start_new_session=True,
                user=NOBODY if self.drops_privileges else None,
                group=NOBODY if self.drops_privileges else None,
                extra_groups=[] if self.drops_privileges else None,
            )

    def make_directory(self, name: str) -> Path:
        """A new directory in this folder that the spawned programs may write."""
        directory = self.path / name
        directory.mkdir(mode=0o700)
        self.hand_over(directory)
        return directory

    def hand_over(self, directory: Path) -> None:
        """Give a directory and all in it to the user as whom the programs run."""
        if self.drops_privileges:
            for path in (directory, *directory.rglob("*")):
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def readable_by_others(path: Path) -> bool:
    """Whether a user who owns nothing on the way can reach the path and read it."""
    path = path.resolve()
    return bool(path.stat().st_mode & 0o004) and all(parent.stat().st_mode & 0o001 for parent in path.parents)


def reserve_port() -> socket.socket:
    """A socket bound to a free port of 127.0.0.1, to be kept open as long as the port is wanted.

    On Linux a server that sets SO_REUSEADDR can listen on the port beside it, while nobody else is ever given the port:
    not before the server is up, and not while it is down.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def _neutral_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}


class EmbeddedServer(ABC):
    """A server program in a guarded folder, listening on one port of 127.0.0.1 that stays the same over restarts.

    Enter it to start it. Leaving kills it and removes all it wrote, whatever state it is in. None of this is
    asynchronous: starting takes up to a second, so a running event loop should do it in a thread.
    """

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    unprivileged: ClassVar[bool] = False

    @abstractmethod
    def _prepare(self) -> None:
        """Make in the folder what the program needs, once."""

    @abstractmethod
    def _command(self) -> Sequence[str | Path]:
        """The program with its arguments."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether it accepts clients by now. Must not wait."""

    def __enter__(self) -> Self:
        self._folder = GuardedFolder(unprivileged=self.unprivileged)
        self._folder.__enter__()
        self._process: subprocess.Popen[bytes] | None = None
        self._holder = reserve_port()
        self.port: int = self._holder.getsockname()[1]
        try:
            self._prepare()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._folder.__exit__(*exc_info)
        if self._process is not None:
            self._process.wait()
        self._holder.close()

    @property
    def pid(self) -> int:
        """Of the process that was started, not of its children."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    @property
    def directory(self) -> Path:
        """The temporary folder with everything it writes."""
        return self._folder.path

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def start(self) -> None:
        """Start it and wait until it accepts clients; after `stop` or `kill`: again, on the same data and port.

        Raises:
            ServerDiedError: it ended at once, or was not ready within half a minute.
        """
        assert self._process is None or self._process.poll() is not None, f"{self.name} is running"
        if sys.platform != "linux":
            self._holder.close()  # elsewhere it would be in the way
        self._process = process = self._folder.spawn(self._command(), self._log)
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise self._died()
            time.sleep(_POLL_SECONDS)

    def stop(self, number: signal.Signals | None = None) -> None:
        """End it in an orderly way, even when it is frozen; kill it if that takes longer than ten seconds."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(number or self.stop_signal)
        self.thaw()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self.kill()  # and what it left behind

    def restart(self) -> None:
        """`stop` and `start`."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """Kill it and all its children without notice: a crash. What it wrote stays as it is."""
        while signal_all(self.directory, signal.SIGKILL):
            time.sleep(_POLL_SECONDS)
        if self._process is not None:
            self._process.wait()

    def freeze(self) -> None:
        """Keep it and its children from running; connections stay open and nothing answers: a half-open link."""
        stopped: set[int] = set()
        while not stopped.issuperset(pids := signal_all(self.directory, signal.SIGSTOP)):
            stopped.update(pids)  # and look again: one may just have been forked

    def thaw(self) -> None:
        """Let it run on."""
        signal_all(self.directory, signal.SIGCONT)

    def _run(self, command: Sequence[str | Path]) -> None:
        """Run a program in the folder to its end."""
        process = self._folder.spawn(command, self._log)
        if process.wait(START_SECONDS) != 0:
            raise self._died()

    def _died(self) -> ServerDiedError:
        return ServerDiedError(
            f"{self.name} did not start: {' | '.join(self.log.splitlines()[-5:]) or 'it said nothing'}"
        )

    @property
    def _log(self) -> Path:
        return self.directory / "log"
