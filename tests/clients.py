"""Clients as a user would write them: they fold what they are sent into a copy and obey `resync`."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

Message = dict[str, Any]


class Copy:
    """A user's copy of `posts`, folded as docs/protocol.md says.

    Attributes:
        position: what to resume from.
        history: every data message, in the order received.
        resyncs: reasons, in the order received.
    """

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self.token = token
        self.rows: dict[int, Message] = {}
        self.position: str | None = None
        self.complete_until: str | None = None
        self.history: list[Message] = []
        self.resyncs: list[str] = []

    async def load(self) -> None:
        """Read the table again as the user."""
        self.rows, position = await read_posts(self.url, self.token)
        if self.position is None:
            self.position = position

    async def take(self, message: Message) -> None:
        kind = message["type"]
        if kind == "resync":
            self.resyncs.append(message["reason"])
            await asyncio.sleep(message["after_ms"] / 1000)
            await self.load()
        elif kind in ("INSERT", "UPDATE"):
            self.history.append(message)
            row = message["record"]
            before = message.get("old_record", {}).get("id")
            known = self.rows.pop(before, {}) if before is not None else {}
            self.rows[row["id"]] = {**known, **row} if kind == "UPDATE" else row
        elif kind == "DELETE":
            self.history.append(message)
            self.rows.pop(message["old_record"]["id"], None)
        if "position" in message:
            self.position = message["position"]
        self.complete_until = message.get("complete_until", self.complete_until)

    async def poll(self, client: httpx.AsyncClient, wait: float = 2, limit: int = 500) -> bool:
        """One long poll; whether it brought anything."""
        query = {"wait": wait, "limit": limit} | ({"position": self.position} if self.position else {})
        answer = await client.get(f"{self.url}/events?{urlencode(query)}", headers=bearer(self.token))
        answer.raise_for_status()
        body = answer.json()
        for message in body["messages"]:
            await self.take(message)
        self.position = body["position"]
        self.complete_until = body["complete_until"] or self.complete_until
        return bool(body["messages"])

    async def follow(self) -> None:
        """Read a WebSocket until it ends, from the copy's position."""
        async with open_socket(self.url, self.token, position=self.position) as socket:
            while True:
                try:
                    message = await receive(socket, 60)
                except ConnectionClosed:
                    return
                await self.take(message)


async def read_posts(url: str, token: str) -> tuple[dict[int, Message], str]:
    """All posts that a user sees, page by page, and the first page's position."""
    rows: dict[int, Message] = {}
    position, after = "", 0
    async with http(url, token) as client:
        while True:
            answer = await client.get(f"/posts?limit=500&after={after}")
            answer.raise_for_status()
            position = position or answer.headers["Realtime-Position"]
            page = answer.json()
            rows |= {row["id"]: row for row in page}
            if len(page) < 500:
                return rows, position
            after = page[-1]["id"]


def http(url: str, token: str | None = None) -> httpx.AsyncClient:
    """A client of a bridge. It is not prepared for TLS, which would take it as long as all that it is made for."""
    headers = {} if token is None else bearer(token)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=60, verify=False)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@asynccontextmanager
async def open_socket(url: str, token: str | None, /, **query: str | None) -> AsyncIterator[ClientConnection]:
    """A WebSocket to `/ws`, with a token in its header."""
    given = {name: value for name, value in query.items() if value is not None}
    address = url.replace("http", "ws", 1) + "/ws" + (f"?{urlencode(given)}" if given else "")
    headers = {} if token is None else bearer(token)
    async with connect(address, additional_headers=headers, compression=None, max_size=None) as socket:
        yield socket


SOCKET = (
    "/ws",
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)
STREAM = ("/events", "Accept: text/event-stream")


@dataclass
class Link:
    """A connection of bare bytes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def socket(self) -> socket.socket:
        return self.writer.get_extra_info("socket")  # type: ignore[no-any-return]


@asynccontextmanager
async def open_link(url: str, token: str, path: str, *headers: str) -> AsyncIterator[Link]:
    """A client that sends a request, takes in `ready`, and then does no more than it is made to.

    What it does not read stays with the server, but for some kilobytes.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    address = urlsplit(url)
    await asyncio.get_running_loop().sock_connect(sock, (address.hostname, address.port))
    link = Link(*await asyncio.open_connection(sock=sock, limit=2048))
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {token}", *headers]
    try:
        link.writer.write("\r\n".join([*lines, "", ""]).encode())
        await link.reader.readuntil(b'"type":"ready"')
        yield link
    finally:
        link.writer.transport.abort()
        with suppress(OSError):
            await link.writer.wait_closed()


async def receive(socket: ClientConnection, timeout: float = 10) -> Message:
    """The next message."""
    async with asyncio.timeout(timeout):
        message: Message = json.loads(await socket.recv())
        return message


async def receive_data(socket: ClientConnection, timeout: float = 10) -> Message:
    """The next message that is a change or a resync."""
    async with asyncio.timeout(timeout):
        while True:
            message = await receive(socket, timeout)
            if message["type"].isupper() or message["type"] == "resync":
                return message
