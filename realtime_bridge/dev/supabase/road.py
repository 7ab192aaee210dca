"""The road to a server on this machine: a TCP relay that can be frozen, and closed for a while.

What it carries it does not understand, so that everything stands still in a frozen one: handshakes, pings and closes.
Only the first word is looked at, by which requests that write go to a server of their own.

Layer: whole (dev). May import: nothing of this package.
"""

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

CHUNK: Final = 65_536


class Road:
    """Carries what reaches its `port` to `target`, a port of this machine, and back; a POST to `posts`.

    Enter it after the servers that it leads to.
    """

    port: int

    def __init__(self, target: int, posts: int) -> None:
        self._target = target
        self._posts = posts
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._ends: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.thaw()
        self._close()

    def freeze(self) -> None:
        """Let nothing move in either direction any more; connections stay open, and new ones are accepted."""
        self._is_open.clear()

    def thaw(self) -> None:
        """Let everything move again, beginning with what was held back."""
        self._is_open.set()

    async def restart(self, seconds: float) -> None:
        """Cut every connection, listen to nobody for so long, then at the same port again."""
        self._close()
        await asyncio.sleep(seconds)
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self.port)

    def _close(self) -> None:
        self._server.close()
        for end in self._ends:
            end.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = {writer}
        self._ends.add(writer)
        try:
            first = await reader.read(CHUNK)
            port = self._posts if first.startswith(b"POST ") else self._target
            there, back = await asyncio.open_connection("127.0.0.1", port)
            ends.add(back)
            self._ends.add(back)
            await self._is_open.wait()
            back.write(first)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump(reader, back), name="there")
                tasks.create_task(self._pump(there, writer), name="back")
        except* OSError:
            pass  # one end is gone, and so is the other
        finally:
            for end in ends:
                self._ends.discard(end)
                end.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(CHUNK):
            await self._is_open.wait()
            target.write(data)
            await target.drain()
        await self._is_open.wait()
        with suppress(OSError):
            target.write_eof()
