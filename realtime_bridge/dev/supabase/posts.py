"""The stand-in's server for POST, which the one for WebSockets does not take: one request a connection.

Layer: whole (dev). May import: errors.
"""

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http.client import parse_headers
from typing import Final, TypeAlias

from websockets.datastructures import Headers
from websockets.http11 import Response

MOST_BYTES: Final = 65_536

Answer: TypeAlias = Callable[[str, Headers, bytes], Awaitable[Response]]
"""Answers a request for a path with its query."""


@asynccontextmanager
async def serve_posts(answer: Answer) -> AsyncIterator[int]:
    """Serve, and yield the port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first, _, rest = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
            headers = Headers(parse_headers(io.BytesIO(rest)).items())
            body = await reader.readexactly(min(int(headers.get("Content-Length", "0")), MOST_BYTES))
            writer.write((await answer(first.split()[1].decode(), headers, body)).serialize())
            await writer.drain()
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # the other side has gone, or makes no sense
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, limit=MOST_BYTES) as server:
        yield server.sockets[0].getsockname()[1]
