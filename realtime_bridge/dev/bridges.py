"""A bridge as a child process that does not outlive its parent.

Layer: whole (dev). May import: errors, dev.processes; it runs dev.app.
"""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final, Self

import orjson

from realtime_bridge.dev.processes import START_SECONDS, GuardedFolder, ServerDiedError

STOP_SECONDS: Final = 5.0
DRAIN_SECONDS: Final = 2
_BACKLOG: Final = 128
_POLL_SECONDS: Final = 0.05
_ANSWER_SECONDS: Final = 2.0


def listen(port: int) -> socket.socket:
    """A socket that listens on a port of 127.0.0.1; 0 lets the system pick.

    Raises:
        ServerDiedError: another program has the port.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ServerDiedError(
            f"port {port} cannot be used ({reason}): choose another with --port, or --port 0"
        ) from error
    return listener


class BridgeChild:
    """One bridge. Entering starts it, which takes a second; leaving ends it, in order if there is time.

    Args:
        listener: where it serves; closed here once the child has it.
        environment: its settings, beside the environment of this process.
        users: how many sample users its page shows.
    """

    def __init__(self, listener: socket.socket, environment: Mapping[str, str], *, users: int) -> None:
        self.port: int = listener.getsockname()[1]
        self.name = f"the bridge on port {self.port}"
        self._listener = listener
        self._environment = environment
        self._users = users

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text(errors="replace")

    async def __aenter__(self) -> Self:
        self._folder = GuardedFolder()
        self._folder.__enter__()
        self._log = self._folder.path / "log"
        descriptor = self._listener.fileno()
        with self._log.open("wb") as log, self._listener:
            self._process = subprocess.Popen(  # noqa: ASYNC220, S603
                [sys.executable, "-m", "realtime_bridge.dev.app", str(descriptor), str(self._users)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder.path,  # by which the folder's guard knows it
                env={**os.environ, **self._environment},
                pass_fds=[descriptor],
                start_new_session=True,  # Ctrl-C is for the parent, which then ends its children in order
            )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            self.terminate()
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, STOP_SECONDS)
        finally:
            self._folder.__exit__()  # kills what is left
            self._process.wait()

    def terminate(self) -> None:
        """Ask it to end; it takes up to `DRAIN_SECONDS` for its clients."""
        with suppress(ProcessLookupError):
            self._process.terminate()

    async def ready(self) -> None:
        """Wait until `/readyz` says that it can do its job.

        Raises:
            ServerDiedError: it has ended, or was not ready within half a minute; the message says why.
        """
        problem = "it does not answer"
        try:
            async with asyncio.timeout(START_SECONDS):
                while problem := await self._problem():  # noqa: ASYNC110  (it is another process)
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            raise ServerDiedError(f"{self.name} is not ready after {START_SECONDS:.0f} s: {problem}") from None

    async def _problem(self) -> str:
        """Why it is not ready; empty once it is."""
        if self.has_ended:
            raise ServerDiedError(f"{self.name} did not start")
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                status, body = await _get(self.port, "/readyz")
        except (OSError, EOFError, TimeoutError, ValueError):
            return "it does not answer"
        if status == HTTPStatus.OK:
            return ""
        checks = body.get("checks", {})
        reasons = [f"{name}: {check['reason']}" for name, check in checks.items() if not check["ok"]]
        return "; ".join(reasons) or str(body.get("detail", status))


async def _get(port: int, path: str) -> tuple[int, dict[str, Any]]:
    """Ask a server on this machine for JSON."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        return int(head.split(maxsplit=2)[1]), orjson.loads(await reader.read())
    finally:
        writer.close()
