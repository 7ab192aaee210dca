"""The one entrance for WebSocket routes: accept, and let the best sink there is carry the connection.

Layer: edges. May import: hub.base, transports.asgi, wire.frames. Never the uvicorn protocol: it offers itself.
"""

from collections.abc import Callable
from contextlib import suppress

from starlette.websockets import WebSocket, WebSocketDisconnect

from realtime_bridge.hub.base import Receiver, Sink
from realtime_bridge.transports.asgi import AsgiSink
from realtime_bridge.wire.frames import clip_reason


async def serve_socket(
    websocket: WebSocket,
    receiver_factory: Callable[[Sink], Receiver],
    *,
    send_buffer_bytes: int,
    subprotocol: str | None = None,
) -> None:
    """Accept, and connect the client with the receiver that the factory makes for its sink.

    Returns as soon as that is done where the server lets us have the transport, and else when the connection is over;
    the route must return then without another use of `websocket`. The factory is not called for a client that has
    gone meanwhile; what it raises comes out of here, and the accepted connection is then the route's to close.
    """
    takeover = (websocket.scope.get("extensions") or {}).get("realtime_bridge")
    if takeover is not None:
        takeover["take_over"](receiver_factory, send_buffer_bytes=send_buffer_bytes)
    try:
        await websocket.accept(subprotocol)
    except OSError:  # gone before it was accepted
        return
    if takeover is None:
        await AsgiSink(websocket, send_buffer_bytes=send_buffer_bytes).serve(receiver_factory)


async def refuse_socket(websocket: WebSocket, code: int, reason: str, *, subprotocol: str | None = None) -> None:
    """Accept, then close: a browser shows its page a close code, but never the status of a refused handshake."""
    with suppress(OSError, WebSocketDisconnect):
        await websocket.accept(subprotocol)
        await websocket.close(code, clip_reason(reason))
