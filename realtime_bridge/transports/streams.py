"""The one entrance for routes of Server-Sent Events: start the response, and let the best sink there is carry it.

Layer: edges. May import: hub.base, transports.asgi. Never the uvicorn protocol: it offers itself.
Sources: the HTML standard, section 9.2; nginx' X-Accel-Buffering.
"""

from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from realtime_bridge.hub.base import Receiver, Sink
from realtime_bridge.transports.asgi import AsgiEventSink

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """A response whose body is written by a sink.

    Sent as an ASGI application it returns as soon as the sink stands where the server lets us have the transport, and
    else when the stream is over.

    Args:
        receiver_factory: makes the receiver of the sink; what it raises breaks the stream off.
    """

    media_type = "text/event-stream"

    def __init__(self, receiver_factory: Callable[[Sink], Receiver], *, send_buffer_bytes: int) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._receiver_factory = receiver_factory
        self._send_buffer_bytes = send_buffer_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start the response and connect its client with the receiver."""
        takeover = (scope.get("extensions") or {}).get("realtime_bridge")
        if takeover is not None:
            takeover["take_over"](self._receiver_factory, send_buffer_bytes=self._send_buffer_bytes)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if takeover is None:
            sink = AsgiEventSink(receive, send, send_buffer_bytes=self._send_buffer_bytes)
            await sink.serve(self._receiver_factory)
