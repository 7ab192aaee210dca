"""A proxy that cuts, delays and narrows: stands between any two programs and breaks as it is told to."""

import asyncio
import math
from collections import deque
from types import TracebackType
from typing import Self


class Proxy:
    """Passes bytes on to a port of 127.0.0.1, in both directions, for any number of links.

    Attributes:
        upstream: that port; counts for new links.
        refuses: new links are broken at once.
        delay: seconds that everything takes longer, in each direction; order is kept.
        rate: bytes that go through a link in a second, in each direction.
    """

    def __init__(self, upstream: int = 0) -> None:
        self.upstream = upstream
        self.refuses = False
        self.delay = 0.0
        self.rate = math.inf
        self._is_deaf = False
        self._links: set[_Link] = set()

    @property
    def port(self) -> int:
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def is_deaf(self) -> bool:
        """Whether bytes are taken in and go nowhere: the links stand, and nothing tells that they are of no use."""
        return self._is_deaf

    @is_deaf.setter
    def is_deaf(self, value: bool) -> None:
        self._is_deaf = value
        for link in self._links:
            for end in link.ends:
                end.pass_on()

    def cut(self) -> None:
        """Break every link there is, without a farewell."""
        for link in tuple(self._links):
            link.abort()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Link(self).ends[0], "127.0.0.1")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        await asyncio.gather(*(link.ended() for link in tuple(self._links)))

    def begin(self, link: "_Link") -> None:
        self._links.add(link)

    def end(self, link: "_Link") -> None:
        self._links.discard(link)


class _Link:
    """Two connections, of which each is told what comes from the other."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.ends = (_End(self), _End(self))
        self.ends[0].other, self.ends[1].other = self.ends[1], self.ends[0]
        self._connecting: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self.proxy.begin(self)
        if self.proxy.refuses:
            self.abort()
        else:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: self.ends[1], "127.0.0.1", self.proxy.upstream)
        except OSError:
            self.abort()

    def abort(self) -> None:
        for end in self.ends:
            end.abort()
        self.proxy.end(self)

    async def ended(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait((self._connecting,))
        self.abort()


class _End(asyncio.Protocol):
    """One end of a link, and what has come in there and is not passed on yet. An empty chunk is the end."""

    other: "_End"

    def __init__(self, link: _Link) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._is_over:
            transport.abort()
        elif self is self._link.ends[0]:
            self._link.begin()
        else:
            self.other.pass_on()

    def data_received(self, data: bytes) -> None:
        proxy = self._link.proxy
        self._due = max(self._due, self._loop.time() + proxy.delay) + len(data) / proxy.rate
        self._waiting.append((self._due, data))
        self.pass_on()

    def eof_received(self) -> bool:
        self.data_received(b"")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_over = True
        self._link.abort()

    def pause_writing(self) -> None:
        if (transport := self.other._transport) is not None:
            transport.pause_reading()

    def resume_writing(self) -> None:
        if (transport := self.other._transport) is not None and not transport.is_closing():
            transport.resume_reading()

    def abort(self) -> None:
        self._is_over = True
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()

    def pass_on(self) -> None:
        """Give the other end what is due, and come back for the rest."""
        out = self.other._transport
        if out is None or self._link.proxy.is_deaf:
            return
        while self._waiting and self._waiting[0][0] <= self._loop.time() and not out.is_closing():
            data = self._waiting.popleft()[1]
            if data:
                out.write(data)
            else:
                out.close()
        if self._waiting and self._timer is None and not out.is_closing():
            self._timer = self._loop.call_at(self._waiting[0][0], self._come_back)

    def _come_back(self) -> None:
        self._timer = None
        self.pass_on()
