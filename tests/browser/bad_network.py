"""What stands between a browser and the bridge: serves the page, hands out tokens, and breaks as it is told to."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.services import token

CLIENT = Path(__file__).parents[2] / "realtime_bridge/static/client.js"
PAGE = Path(__file__).with_name("page.html")


class Site:
    """An HTTP server that answers a few paths itself and passes everything else on to a bridge on the same host.

    Attributes:
        upstream: the bridge's port.
        refused: what is answered with 502 instead of being passed on: given the head of a request, in lower case.
        is_deaf: bytes are taken and go nowhere, in both directions and also for new connections.
        lifetimes: seconds that the tokens handed out are good for, one after the other; the last is for all others.
        token_claims: put into the tokens handed out.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.refused: Callable[[str], bool] = lambda _: False
        self.lifetimes = [3600.0]
        self.token_claims: dict[str, Any] = {}
        self._hears = asyncio.Event()
        self._hears.set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def is_deaf(self) -> bool:
        return not self._hears.is_set()

    @is_deaf.setter
    def is_deaf(self, value: bool) -> None:
        if value:
            self._hears.clear()
        else:
            self._hears.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        await self.cut()

    async def cut(self) -> None:
        """Break every connection there is."""
        for task in (tasks := tuple(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request: every response but an upgrade's is the last of its connection."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            await self._hears.wait()
            path = head.split(" ", 2)[1]
            if (answer := self._own(path)) is not None:
                await _answer(writer, "200 OK", *answer)
            elif self.refused(head.lower()):
                await _answer(writer, "502 Bad Gateway", "text/html", b"<h1>Blocked</h1>")
            else:
                await self._pass_on(head, reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()

    def _own(self, path: str) -> tuple[str, bytes] | None:
        match path.partition("?")[0].split("/")[1:]:
            case ["page.html"]:
                return "text/html", PAGE.read_bytes()
            case ["client.js"]:
                return "text/javascript", CLIENT.read_bytes()
            case ["token", user]:
                ttl = self.lifetimes.pop(0) if len(self.lifetimes) > 1 else self.lifetimes[0]
                return "application/json", json.dumps(token(user, ttl=ttl, **self.token_claims)).encode()
        return None

    async def _pass_on(self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if "upgrade: websocket" not in head.lower():
            lines = [line for line in head.split("\r\n") if not line.lower().startswith("connection:")]
            head = "\r\n".join([lines[0], "Connection: close", *lines[1:]])
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        try:
            up_writer.write(head.encode("latin-1"))
            await _first(self._copy(reader, up_writer), self._copy(up_reader, writer))
        finally:
            up_writer.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._hears.wait()
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
        await writer.drain()
        await asyncio.sleep(0.2)  # for what was written to be taken


async def _answer(writer: asyncio.StreamWriter, status: str, kind: str, body: bytes) -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _first(*works: Coroutine[Any, Any, None]) -> None:
    """Run several until one of them is over."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
