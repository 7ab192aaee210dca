"""Both sinks against a real uvicorn: what a client meets must not depend on which of them carries it."""

import asyncio
import gc
import logging
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.server import ServerProtocol

from realtime_bridge.hub.base import Encoding, Sink
from realtime_bridge.transports import asgi, transport_sinks
from realtime_bridge.transports.sockets import refuse_socket, serve_socket
from realtime_bridge.transports.transport_sinks import SocketSink
from realtime_bridge.transports.uvicorn_protocol import BridgeWebSocketProtocol, RedactQuery
from realtime_bridge.wire.frames import text_frame

pytestmark = pytest.mark.integration

LOOPBACK = ip_address("127.0.0.1")
SEND_BUFFER = 64 * 1024
PATIENCE = 10.0


@pytest.fixture(scope="module", params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


class Recorder:
    """A receiver that keeps what it is told, and holds the sink to its promises."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.texts: list[str] = []
        self.alive_count = 0
        self.room_count = 0
        self.lost_count = 0
        self._within_sink = False

    def say(self, *texts: str) -> None:
        messages = [text.encode() for text in texts]
        if self.sink.encoding is Encoding.FRAME:
            messages = [text_frame(message) for message in messages]
        self.call(lambda: self.sink.write(messages))

    def call(self, method: Callable[[], None]) -> None:
        self._within_sink = True
        method()
        self._within_sink = False

    def received(self, text: str) -> None:
        self._check()
        self.texts.append(text)

    def alive(self) -> None:
        self._check()
        self.alive_count += 1

    def room(self) -> None:
        self._check()
        self.room_count += 1

    def lost(self) -> None:
        self._check()
        self.lost_count += 1

    def _check(self) -> None:
        assert not self._within_sink
        assert not self.lost_count


class Echo(Recorder):
    def received(self, text: str) -> None:
        super().received(text)
        self.say(text)


@dataclass
class Site:
    """A running server with the routes of `application`."""

    fast: bool
    make_receiver: Callable[[Sink], Recorder] = Echo
    may_accept: asyncio.Event = field(default_factory=asyncio.Event)
    receivers: list[Recorder] = field(default_factory=list)
    calls: int = 0
    port: int = 0
    ssl_context: ssl.SSLContext | None = None

    def connect(self, path: str = "/ws", **options: Any) -> connect:
        scheme = "wss" if self.ssl_context else "ws"
        return connect(f"{scheme}://127.0.0.1:{self.port}{path}", ssl=self.ssl_context, **options)

    def receive(self, sink: Sink) -> Recorder:
        self.receivers.append(self.make_receiver(sink))
        return self.receivers[-1]

    @property
    def receiver(self) -> Recorder:
        (receiver,) = self.receivers
        return receiver


def application(site: Site) -> FastAPI:
    app = FastAPI()

    @app.websocket("/ws")
    async def carried(websocket: WebSocket) -> None:
        site.calls += 1
        try:
            await serve_socket(websocket, site.receive, send_buffer_bytes=SEND_BUFFER, subprotocol=chosen(websocket))
        finally:
            site.calls -= 1

    @app.websocket("/late")
    async def late(websocket: WebSocket) -> None:
        site.calls += 1
        await site.may_accept.wait()
        await serve_socket(websocket, site.receive, send_buffer_bytes=SEND_BUFFER)

    @app.websocket("/refused")
    async def refused(websocket: WebSocket) -> None:
        await refuse_socket(websocket, 4401, "token refused: " + "é" * 100)

    @app.websocket("/ordinary")
    async def ordinary(websocket: WebSocket, wait: bool = False) -> None:
        if wait:
            site.calls += 1
            await site.may_accept.wait()
        await websocket.accept()
        with suppress(WebSocketDisconnect):
            while True:
                await websocket.send_text("you said " + await websocket.receive_text())

    @app.websocket("/denied")
    async def denied(websocket: WebSocket) -> None:
        await websocket.close()

    return app


def chosen(websocket: WebSocket) -> str | None:
    return next(iter(websocket.scope["subprotocols"]), None)


@asynccontextmanager
async def serving(site: Site, **options: Any) -> AsyncIterator[uvicorn.Server]:
    ws = BridgeWebSocketProtocol if site.fast else "websockets-sansio"
    config = uvicorn.Config(application(site), ws=ws, lifespan="off", log_config=None, loop="none", **options)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        site.port = listener.getsockname()[1]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.serve([listener]), name="uvicorn")
            await until(lambda: server.started)
            try:
                yield server
            finally:
                server.should_exit = True


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.002)


async def closed(client: ClientConnection) -> tuple[int | None, str | None]:
    """Wait for the end of the connection; the close code and reason that the client was given."""
    async with asyncio.timeout(PATIENCE):
        with suppress(ConnectionClosed):
            while True:
                await client.recv()
    return client.close_code, client.close_reason


class RawClient:
    """A client of bare bytes, for what a well-behaved one will not do."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    @asynccontextmanager
    async def connected(cls, site: Site, path: str = "/ws", *, wait: bool = True) -> AsyncIterator["RawClient"]:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", site.port))
        client = cls(*await asyncio.open_connection(sock=sock, limit=2048))
        client.writer.write(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
        try:
            if wait:
                await client.handshake()
            yield client
        finally:
            client.writer.transport.abort()
            with suppress(OSError):
                await client.writer.wait_closed()

    async def handshake(self) -> None:
        async with asyncio.timeout(PATIENCE):
            assert b" 101 " in await self.reader.readuntil(b"\r\n\r\n")

    def send(self, opcode: Opcode, payload: bytes = b"", *, fin: bool = True) -> None:
        self.writer.write(Frame(opcode, payload, fin=fin).serialize(mask=True))

    async def frame(self) -> tuple[Opcode, bytes]:
        async with asyncio.timeout(PATIENCE):
            first, size = await self.reader.readexactly(2)
            if size == 126:
                (size,) = struct.unpack("!H", await self.reader.readexactly(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", await self.reader.readexactly(8))
            return Opcode(first & 0x0F), await self.reader.readexactly(size)

    async def end(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.reader.read()

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@pytest.fixture(params=[True, False], ids=["fast", "asgi"])
def site(request: pytest.FixtureRequest) -> Site:
    return Site(fast=request.param)


@pytest.fixture
def fast_site() -> Site:
    return Site(fast=True)


async def test_messages_go_both_ways(site: Site) -> None:
    async with serving(site), site.connect() as client:
        for text in ["hello", "", "ü" * 20_000]:
            await client.send(text)
            assert await client.recv() == text
        assert site.receiver.alive_count >= 3


async def test_the_asgi_call_ends_with_the_accept_on_the_fast_path_only(site: Site) -> None:
    async with serving(site), site.connect() as client:
        await client.send("hello")
        await client.recv()
        assert site.calls == (0 if site.fast else 1)


async def test_a_fragmented_message_is_put_together_and_a_ping_within_it_is_answered(site: Site) -> None:
    async with serving(site), RawClient.connected(site) as client:
        client.send(Opcode.TEXT, b"one ", fin=False)
        client.send(Opcode.PING, b"still there?")
        client.send(Opcode.CONT, b"two")
        assert await client.frame() == (Opcode.PONG, b"still there?")
        assert await client.frame() == (Opcode.TEXT, b"one two")


async def test_several_messages_written_at_once_arrive_in_order(site: Site) -> None:
    async with serving(site), site.connect() as client:
        await until(lambda: site.receivers)
        site.receiver.say(*"abc")
        assert [await client.recv() for _ in range(3)] == ["a", "b", "c"]


async def test_a_subprotocol_is_passed_on(site: Site) -> None:
    async with serving(site), site.connect(subprotocols=["bearer"]) as client:
        assert client.subprotocol == "bearer"


async def test_a_close_comes_after_what_was_written_with_code_and_reason(site: Site) -> None:
    async with serving(site), site.connect() as client:
        await until(lambda: site.receivers)
        site.receiver.say("last words")
        site.receiver.call(lambda: site.receiver.sink.close(4401, "token expired"))
        site.receiver.call(lambda: site.receiver.sink.close(4400, "a second close counts for nothing"))
        site.receiver.say("nor does this")
        assert await client.recv() == "last words"
        assert await closed(client) == (4401, "token expired")
        await until(lambda: site.receiver.lost_count)


async def test_a_reason_that_is_too_long_is_cut(site: Site) -> None:
    async with serving(site), site.connect() as client:
        await until(lambda: site.receivers)
        site.receiver.sink.close(4403, "é" * 100)
        assert await closed(client) == (4403, "é" * 61)


async def test_a_close_by_the_client_is_answered_and_told_once(site: Site) -> None:
    async with serving(site), site.connect() as client:
        await client.close(3001)
        assert client.close_code == 3001
        await until(lambda: site.receivers and site.receiver.lost_count)
        site.receiver.say("swallowed")
        site.receiver.sink.ping()
        site.receiver.sink.close(1000)
        site.receiver.sink.abort()


async def test_a_close_without_a_code_is_answered_without_one(fast_site: Site) -> None:
    async with serving(fast_site), RawClient.connected(fast_site) as client:
        client.send(Opcode.CLOSE)
        assert await client.frame() == (Opcode.CLOSE, b"")
        assert await client.end() == b""


async def test_an_abort_ends_the_link_at_once(site: Site) -> None:
    async with serving(site), site.connect() as client:
        await until(lambda: site.receivers)
        site.receiver.call(site.receiver.sink.abort)
        site.receiver.call(site.receiver.sink.abort)
        assert await closed(client) == (1006, "")
        await until(lambda: site.receiver.lost_count)


async def test_an_abort_in_the_midst_of_received_messages_ends_them(fast_site: Site) -> None:
    class Rude(Recorder):
        def received(self, text: str) -> None:
            super().received(text)
            self.sink.abort()

    fast_site.make_receiver = Rude
    async with serving(fast_site), RawClient.connected(fast_site) as client:
        client.writer.write(b"".join(Frame(Opcode.TEXT, b"x").serialize(mask=True) for _ in range(3)) + b"\xff\xff")
        await until(lambda: fast_site.receiver.lost_count)
        assert fast_site.receiver.texts == ["x"]


@pytest.mark.parametrize(
    ("message", "code"), [("x" * 65_537, 4413), ("é" * 32_769, 4413), (b"binary", 4400)], ids=["long", "wide", "binary"]
)
async def test_a_message_that_may_not_be_is_refused_with_its_code(site: Site, message: str | bytes, code: int) -> None:
    async with serving(site), site.connect() as client:
        await client.send(message)
        assert (await closed(client))[0] == code
        await until(lambda: site.receiver.lost_count)
        assert site.receiver.texts == []


async def test_a_message_of_64_kib_is_taken(site: Site) -> None:
    async with serving(site), site.connect() as client:
        await client.send("x" * 65_536)
        assert await client.recv() == "x" * 65_536


async def test_an_endless_message_is_cut_short_with_its_close_code_still_arriving(fast_site: Site) -> None:
    async with serving(fast_site), RawClient.connected(fast_site) as client:
        client.writer.write(b"\x81\xff" + (1 << 40).to_bytes(8, "big") + bytes(4) + bytes(300_000))
        opcode, payload = await client.frame()
        assert (opcode, payload[:2]) == (Opcode.CLOSE, (4413).to_bytes(2, "big"))
        assert await client.end() == b""
        client.writer.close()
        await until(lambda: fast_site.receiver.lost_count)


@pytest.mark.parametrize(("data", "code"), [(b"\x81\x83\0\0\0\0\xff\xfe\xfd", 1007), (b"\x81\x01x", 1002)])
async def test_broken_frames_are_refused_with_one_line_in_the_log(
    fast_site: Site, data: bytes, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "realtime_bridge")
    async with serving(fast_site), RawClient.connected(fast_site) as client:
        client.writer.write(data * 50)
        opcode, payload = await client.frame()
        assert (opcode, payload[:2]) == (Opcode.CLOSE, code.to_bytes(2, "big"))
        client.writer.write(data * 50)
        assert await client.end() == b""
        client.writer.close()
        await until(lambda: fast_site.receiver.lost_count)
    assert [record.message for record in caplog.records if record.name == transport_sinks.__name__] == [
        "client refused"
    ]


async def test_invalid_utf8_is_refused_with_1007(site: Site) -> None:
    async with serving(site), RawClient.connected(site) as client:
        client.send(Opcode.TEXT, b"\xff\xfe")
        opcode, payload = await client.frame()
        assert (opcode, payload[:2]) == (Opcode.CLOSE, (1007).to_bytes(2, "big"))


async def test_a_slow_reader_becomes_full_and_gets_room_again_and_misses_nothing(site: Site) -> None:
    site.make_receiver = Recorder
    async with serving(site), RawClient.connected(site) as client:
        await until(lambda: site.receivers)
        receiver, count = site.receiver, 0
        while not receiver.sink.full:
            receiver.say(f"{count:06}" + "x" * 2000)
            count += 1
            await asyncio.sleep(0)
            assert count * 2000 < 64 * 1024 * 1024
        if site.fast:
            assert count * 2000 < SEND_BUFFER + 512 * 1024  # the rest is owed where it can be seen, not in the kernel
        assert receiver.room_count == 0
        numbers = [int((await client.frame())[1][:6]) for _ in range(count)]
        assert numbers == list(range(count))
        await until(lambda: receiver.room_count == 1)
        assert not receiver.sink.full


async def test_one_who_pings_and_reads_nothing_is_owed_one_pong(fast_site: Site) -> None:
    fast_site.make_receiver = Recorder
    async with serving(fast_site), RawClient.connected(fast_site) as client:
        await until(lambda: fast_site.receivers)
        receiver, count = fast_site.receiver, 0
        while not receiver.sink.full:
            receiver.say("x" * 2000)
            count += 1
            await asyncio.sleep(0)
        for number in range(100):
            client.send(Opcode.PING, str(number).encode())
        client.send(Opcode.TEXT, b"done")
        await until(lambda: receiver.texts)
        for _ in range(count):
            await client.frame()
        assert await client.frame() == (Opcode.PONG, b"99")


async def test_a_ping_of_ours_proves_the_peer_alive(site: Site) -> None:
    async with serving(site), site.connect():
        await until(lambda: site.receivers)
        alive = site.receiver.alive_count
        site.receiver.call(site.receiver.sink.ping)
        await until(lambda: site.receiver.alive_count > alive)


async def test_a_reset_by_the_peer_is_told_once(site: Site) -> None:
    async with serving(site), RawClient.connected(site) as client:
        await until(lambda: site.receivers)
        client.reset()
        for _ in range(20):
            site.receiver.say("into the void")
            await asyncio.sleep(0)
        await until(lambda: site.receiver.lost_count)


async def test_a_half_closed_peer_is_told_once(site: Site) -> None:
    async with serving(site), RawClient.connected(site) as client:
        await until(lambda: site.receivers)
        client.writer.write_eof()
        await until(lambda: site.receiver.lost_count)


async def test_a_peer_that_ignores_the_close_is_dropped_in_time(
    fast_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport_sinks, "CLOSE_SECONDS", 0.05)
    async with serving(fast_site), RawClient.connected(fast_site) as client:
        await until(lambda: fast_site.receivers)
        fast_site.receiver.sink.close(4401, "token expired")
        await until(lambda: fast_site.receiver.lost_count)
        assert (await client.frame())[0] == Opcode.CLOSE


async def test_a_peer_that_reads_nothing_cannot_hold_up_a_close(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_sinks, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(asgi, "CLOSE_SECONDS", 0.05)
    async with serving(site), RawClient.connected(site) as client:
        await until(lambda: site.receivers)
        site.receiver.say(*["x" * 1_000_000] * 20)
        site.receiver.sink.close(4401, "token expired")
        await until(lambda: site.receiver.lost_count)
        client.reset()


async def test_a_peer_that_reads_nothing_and_hangs_up_is_dropped_in_time(
    fast_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport_sinks, "CLOSE_SECONDS", 0.05)
    async with serving(fast_site), RawClient.connected(fast_site) as client:
        await until(lambda: fast_site.receivers)
        fast_site.receiver.say("x" * 1_000_000)
        client.writer.write_eof()
        await until(lambda: fast_site.receiver.lost_count)


async def test_a_shutdown_sends_1012_with_the_time_to_come_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SocketSink, "restart_spread_seconds", 0.5)
    async with serving(site) as server, site.connect() as client:
        await until(lambda: site.receivers)
        server.should_exit = True
        code, reason = await closed(client)
        assert code == 1012
        if site.fast:
            words = (reason or "").split()
            assert (words[:2], words[3:]) == (["retry", "in"], ["ms"])
            assert 0 <= int(words[2]) <= 500
        await until(lambda: site.receiver.lost_count)
        await until(lambda: not server.server_state.connections)


@pytest.mark.parametrize("compression", ["deflate", None])
async def test_an_ordinary_route_works_unchanged(site: Site, compression: str | None) -> None:
    async with serving(site), site.connect("/ordinary", compression=compression) as client:
        assert [extension.name for extension in client.protocol.extensions] == (
            ["permessage-deflate"] if compression else []
        )
        for text in ["hello", "x" * 200_000]:
            await client.send(text)
            assert await client.recv() == "you said " + text


async def test_no_compression_is_agreed_on_for_a_connection_that_is_taken_over(fast_site: Site) -> None:
    async with serving(fast_site), fast_site.connect(compression="deflate") as client:
        assert client.protocol.extensions == []


async def test_bytes_that_came_before_the_accept_are_received_first(site: Site) -> None:
    async with serving(site), RawClient.connected(site, "/late", wait=False) as client:
        await until(lambda: site.calls)
        client.send(Opcode.TEXT, b"early")
        await client.writer.drain()
        await asyncio.sleep(0.02)  # not waited for: it is right too if the bytes come later
        site.may_accept.set()
        await client.handshake()
        client.send(Opcode.TEXT, b"later")
        assert [await client.frame(), await client.frame()] == [(Opcode.TEXT, b"early"), (Opcode.TEXT, b"later")]


async def test_an_ordinary_route_gets_early_bytes_too(site: Site) -> None:
    async with serving(site), RawClient.connected(site, "/ordinary?wait=1", wait=False) as client:
        await until(lambda: site.calls)
        client.send(Opcode.TEXT, b"early")
        await client.writer.drain()
        await asyncio.sleep(0.02)
        site.may_accept.set()
        await client.handshake()
        assert await client.frame() == (Opcode.TEXT, b"you said early")


async def test_a_client_gone_before_the_accept_gets_no_receiver(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(site) as server:
        async with RawClient.connected(site, "/late", wait=False) as client:
            await until(lambda: site.calls)
            client.reset()
            await until(lambda: not server.server_state.connections)
        site.may_accept.set()
        await until(lambda: not server.server_state.tasks)
    assert [receiver.lost_count for receiver in site.receivers] == []
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_receiver_that_cannot_be_made_ends_the_connection(site: Site) -> None:
    def fail(sink: Sink) -> Recorder:
        raise LookupError("no receiver today")

    site.make_receiver = fail
    async with serving(site), site.connect() as client:
        assert (await closed(client))[0] == 1006


async def test_a_refused_socket_shows_code_and_reason(site: Site) -> None:
    async with serving(site), site.connect("/refused") as client:
        code, reason = await closed(client)
        assert code == 4401
        assert reason == "token refused: " + "é" * 54


async def test_no_token_reaches_the_log(fast_site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "websockets.client")
    caplog.set_level(logging.DEBUG)
    secret = "s3cr3t"
    headers = {"Authorization": f"Bearer {secret}"}
    async with serving(fast_site):
        for path in ["/ws", "/ordinary", "/refused"]:
            async with fast_site.connect(f"{path}?token={secret}", additional_headers=headers) as client:
                if path != "/refused":
                    await client.send(secret)
                    await client.recv()
        with pytest.raises(Exception, match="403"):
            await fast_site.connect(f"/denied?token={secret}")
    assert '"WebSocket /ws" [accepted]' in caplog.text
    assert '"WebSocket /denied" 403' in caplog.text
    assert secret not in caplog.text


@pytest.mark.parametrize(
    ("path", "logged"),
    [
        ("/ws?token=abc", "/ws?[redacted]"),
        ("/events?table=public.posts&ticket=abc", "/events?[redacted]"),
        ("/realtime/v1/websocket?apikey=abc&vsn=1.0.0", "/realtime/v1/websocket?[redacted]"),
        ("/ws?%74oken=abc", "/ws?[redacted]"),
        ("/ws?access_Token=abc", "/ws?[redacted]"),
        ("/posts?limit=10", "/posts?limit=10"),
        ("/token", "/token"),
    ],
)
def test_the_access_log_loses_queries_that_hold_a_credential(path: str, logged: str) -> None:
    line = '%s - "%s %s HTTP/%s" %d'
    record = logging.LogRecord(
        "uvicorn.access", logging.INFO, "", 0, line, ("1.2.3.4:5", "GET", path, "1.1", 200), None
    )
    assert RedactQuery().filter(record)
    assert record.getMessage() == f'1.2.3.4:5 - "GET {logged} HTTP/1.1" 200'


async def test_nothing_of_the_handshake_is_kept_nor_left_to_the_garbage_collector(fast_site: Site) -> None:
    async with serving(fast_site) as server:
        gc.collect()
        gc.disable()
        try:
            async with fast_site.connect():
                await until(lambda: fast_site.receivers and not server.server_state.tasks)
                assert [type(thing).__name__ for thing in gc.get_objects() if is_handshake(thing)] == []
                assert set[object](server.server_state.connections) == {fast_site.receiver.sink}
        finally:
            gc.enable()


def is_handshake(thing: object) -> bool:
    """Whether it is uvicorn's, websockets' or starlette's part of a server-side connection."""
    return isinstance(thing, BridgeWebSocketProtocol | ServerProtocol | WebSocket) or (
        type(thing) is dict and thing.get("type") == "websocket" and "query_string" in thing
    )


async def test_the_fast_path_works_under_tls(fast_site: Site, tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    fast_site.ssl_context = ssl.create_default_context(cafile=certificate)
    fast_site.make_receiver = Echo
    async with serving(fast_site, ssl_certfile=certificate, ssl_keyfile=key):
        async with fast_site.connect() as client:
            await client.send("hello")
            assert await client.recv() == "hello"
            await client.send("x" * 65_537)
            assert (await closed(client))[0] == 4413
        async with fast_site.connect() as client:
            await client.close(3001)
            assert client.close_code == 3001
        await until(lambda: [receiver.lost_count for receiver in fast_site.receivers] == [1, 1])


async def test_a_slow_reader_under_tls_becomes_full_and_gets_room_again(fast_site: Site, tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    fast_site.ssl_context = ssl.create_default_context(cafile=certificate)
    fast_site.make_receiver = Recorder
    async with (
        serving(fast_site, ssl_certfile=certificate, ssl_keyfile=key),
        fast_site.connect(max_queue=1) as client,
    ):
        await until(lambda: fast_site.receivers)
        receiver, count = fast_site.receiver, 0
        while not receiver.sink.full:
            receiver.say("x" * 2000)
            count += 1
            await asyncio.sleep(0)
        for _ in range(count):
            await client.recv()
        await until(lambda: receiver.room_count)


def self_signed(folder: Path) -> tuple[str, str]:
    """Files with a certificate for 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(LOOPBACK)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(certificate_file), str(key_file)
