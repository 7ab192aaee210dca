"""Bridges as an operator runs them: `realtime-bridge serve` in processes of their own."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

import httpx

from tests.clients import http
from tests.forks import fork
from tests.services import SECRET, eventually

PUBLICATION = "bridge"


def environment(database: str, **settings: str) -> dict[str, str]:
    """The environment of a bridge: nothing of ours but what is given."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("BRIDGE_", "SUPABASE_", "DATABASE_", "REDIS_"))}
    given = {"DATABASE_URL": database, "SUPABASE_JWT_SECRET": SECRET, "BRIDGE_PUBLICATION": PUBLICATION, **settings}
    return {**kept, **given}


def run(*arguments: str, folder: Path, environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """A command of `realtime-bridge` as an operator runs it."""
    command = [sys.executable, "-m", "realtime_bridge", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, timeout=50)


class BridgeProcess:
    """One `realtime-bridge serve`. Enter it to start it; it is ready when `/readyz` says so.

    Attributes:
        plant: called in its process before it begins, to change what it is.
    """

    def __init__(self, database: str, *arguments: str, **settings: str) -> None:
        self._environment = environment(database, **settings)
        self._arguments = arguments
        self._folder = TemporaryDirectory(prefix="bridge-test-", ignore_cleanup_errors=True)
        self._log = Path(self._folder.name, "log")
        self._log.touch()
        self.plant: Callable[[], None] | None = None
        self.port = 0  # the system picks one at the first start, and later starts keep it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def socket_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, "started"
        return self._process.pid

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def lines_of_requests(self) -> int:
        """Lines logged so far, but for those of the work behind, which goes on whatever is asked."""
        loggers = [json.loads(line)["logger"].split(".")[1] for line in self.log.split("\n")[:-1]]
        return sum(1 for logger in loggers if logger not in ("ingest", "repair", "seeding", "sources"))

    def memory(self, what: str = "RssAnon") -> int:
        """Bytes that the process has, where that can be told: by default those of its own. See proc_pid_status(5)."""
        status = Path(f"/proc/{self.pid}/status")
        found = re.search(rf"{what}:\s+(\d+) kB", status.read_text()) if status.exists() else None
        return int(found[1]) * 1024 if found else 0

    def start(self) -> None:
        arguments = ["serve", "--port", str(self.port), *self._arguments]
        self._process = fork(arguments, self._environment, self._folder.name, self._log, self.plant)

    async def ready(self, timeout: float = 30) -> None:
        """Wait until it listens and says that it can do its job."""

        async def is_ready() -> bool:
            assert self._process.is_alive(), f"the bridge has ended:\n{self.log}"
            found = re.findall(r'"port":"(\d+)"', self.log)
            if not found:
                return False
            self.port = int(found[-1])
            try:
                return (await client.get(f"{self.url}/readyz")).status_code == 200
            except httpx.TransportError:
                return False

        async with http("") as client:
            try:
                await eventually(is_ready, timeout)
            except AssertionError as error:
                raise AssertionError(f"not ready:\n{self.log}") from error

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def run(self, timeout: float = 30) -> int:
        """Start it where it is expected to end by itself: the exit status."""
        self.start()
        try:
            return self.wait(timeout)
        finally:
            self.kill()

    def stop(self, timeout: float = 15) -> int:
        """SIGTERM, and the exit status."""
        self._process.terminate()
        return self.wait(timeout)

    def kill(self) -> None:
        self._process.kill()
        self.wait(5)

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"the bridge does not end:\n{self.log}"
        return self._process.exitcode

    def forget(self) -> None:
        """Remove its folder, log and all. Leaving the block does it, too."""
        self._folder.cleanup()

    async def __aenter__(self) -> Self:
        self.start()
        try:
            await self.ready()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.is_alive():
            self.signal(signal.SIGCONT)
            self._process.terminate()
            await asyncio.to_thread(self._process.join, 15)  # what it says good-bye to may live in this loop
            self.kill()
        if kind is not None:
            sys.stderr.write(f"--- log of the bridge on port {self.port} ---\n{self.log[-8000:]}\n")
        self.forget()
