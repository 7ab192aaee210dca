"""What one client costs by each way to serve it, and what one delivery to it costs.

Decision served: whether a uvicorn protocol class of our own is worth having beside the plain ASGI sink, and whether
either is worth having instead of a FastAPI endpoint that calls `send_text` for everyone.

Each server is a process of its own (uvicorn, uvloop, no compression, no access log). CPU is user and system time of
that process; the clock stops when every client has received everything. Run it as `python -m bench.sinks`.
"""

import argparse
import asyncio
import gc
import http.client
import json
import os
import platform
import resource
import selectors
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from realtime_bridge.hub.base import Encoding, Sink
from realtime_bridge.transports.sockets import serve_socket
from realtime_bridge.transports.uvicorn_protocol import BridgeWebSocketProtocol
from realtime_bridge.wire.frames import text_frame

TEXT = "x" * 296  # a frame of 300 bytes
WARM_UP = 200
KINDS = {
    "fast": "uvicorn protocol class, ASGI call ended",
    "asgi": "ASGI sink, any server",
    "fastapi": "FastAPI endpoint, send_text in a loop",
}


class Listener:
    """A receiver that only keeps its sink."""

    def __init__(self, sink: Sink, all_sinks: set[Sink]) -> None:
        self._sink, self._all_sinks = sink, all_sinks
        all_sinks.add(sink)

    def received(self, text: str) -> None: ...

    def alive(self) -> None: ...

    def room(self) -> None: ...

    def lost(self) -> None:
        self._all_sinks.discard(self._sink)


def sink_site(app: FastAPI) -> Callable[[int], Awaitable[None]]:
    sinks: set[Sink] = set()

    @app.websocket("/ws")
    async def carried(websocket: WebSocket) -> None:
        await serve_socket(websocket, lambda sink: Listener(sink, sinks), send_buffer_bytes=65_536)

    async def deliver(joined: int) -> None:
        messages = {
            Encoding.FRAME: [text_frame(TEXT.encode())] * joined,
            Encoding.JSON: [TEXT.encode()] * joined,
        }
        for sink in sinks:
            sink.write(messages[sink.encoding])

    return deliver


def fastapi_site(app: FastAPI) -> Callable[[int], Awaitable[None]]:
    websockets: set[WebSocket] = set()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        websockets.add(websocket)
        with suppress(WebSocketDisconnect):
            while True:
                await websocket.receive_text()
        websockets.discard(websocket)

    async def deliver(joined: int) -> None:
        for websocket in list(websockets):
            for _ in range(joined):
                await websocket.send_text(TEXT)

    return deliver


def serve(kind: str, fd: int) -> None:
    """The server process: the site, and two routes to drive and to measure it."""
    app = FastAPI()
    deliver = (fastapi_site if kind == "fastapi" else sink_site)(app)

    @app.get("/usage")
    async def usage() -> dict[str, float]:
        gc.collect()
        cpu = resource.getrusage(resource.RUSAGE_SELF)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {"cpu": cpu.ru_utime + cpu.ru_stime, "kib": pages * resource.getpagesize() / 1024}

    @app.post("/deliver")
    async def deliver_rounds(rounds: int, joined: int) -> None:
        for _ in range(rounds):
            await deliver(joined)
            await asyncio.sleep(0.01)

    ws = BridgeWebSocketProtocol if kind == "fast" else "websockets-sansio"
    uvicorn.run(app, fd=fd, ws=ws, loop="uvloop", log_level="warning", ws_per_message_deflate=False)


@dataclass
class Usage:
    cpu: float
    kib: float


class Site:
    """The server process as seen from here, and the clients that it has."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._selector = selectors.DefaultSelector()
        self._sockets: list[socket.socket] = []

    def open(self, count: int) -> None:
        request = (
            b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", self._port))
            sock.sendall(request)
            answer = sock.recv(4096)
            assert answer.startswith(b"HTTP/1.1 101 "), answer
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ)
            self._sockets.append(sock)

    def deliver(self, rounds: int, joined: int) -> int:
        """Have the server send; wait until all of it is here. Returns the number of messages."""
        count = len(self._sockets) * rounds * joined
        self._ask("POST", f"/deliver?rounds={rounds}&joined={joined}")
        missing = count * len(text_frame(TEXT.encode()))
        while missing:
            for key, _ in self._selector.select():
                assert isinstance(key.fileobj, socket.socket)
                missing -= len(key.fileobj.recv(1 << 20))
        return count

    def usage(self) -> Usage:
        return Usage(**json.loads(self._ask("GET", "/usage")))

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._selector.close()

    def _ask(self, method: str, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        connection.request(method, path)
        response = connection.getresponse()
        assert response.status == 200
        answer = response.read()
        connection.close()
        return answer


@contextmanager
def running(kind: str) -> Iterator[Site]:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        fd, port = listener.fileno(), listener.getsockname()[1]
        command = [sys.executable, "-m", "bench.sinks", "--serve", kind, "--fd", str(fd)]
        with subprocess.Popen(command, pass_fds=[fd]) as process:
            site = Site(port)
            try:
                yield site
            finally:
                site.close()
                process.terminate()


def measure(kind: str, connections: int, rounds: int) -> str:
    with running(kind) as site:
        site.open(WARM_UP)
        site.deliver(2, 1)
        before = site.usage()
        site.open(connections)
        opened = site.usage()
        single = site.deliver(rounds, 1)
        delivered = site.usage()
        joined = site.deliver(rounds, 4)
        ended = site.usage()
    memory = (opened.kib - before.kib) / connections
    handshake = (opened.cpu - before.cpu) / connections * 1e6
    delivery = (delivered.cpu - opened.cpu) / single * 1e6
    of_four = (ended.cpu - delivered.cpu) / joined * 1e6
    return f"{kind:8} {memory:12.1f} {handshake:13.0f} {delivery:12.1f} {of_four:14.1f}   {KINDS[kind]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.fd)
        return
    versions = " ".join(f"{name} {version(name)}" for name in ("uvicorn", "uvloop", "websockets", "starlette"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    print(
        f"{options.connections} connections, {options.rounds} rounds, frames of {len(text_frame(TEXT.encode()))} bytes"
    )
    print(f"{'':8} {'KiB / idle':>12} {'µs / opening':>13} {'µs / message':>12} {'µs / 4 joined':>14}")
    for kind in KINDS:
        print(measure(kind, options.connections, options.rounds), flush=True)


if __name__ == "__main__":
    main()
