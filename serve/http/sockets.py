"""Bounds on what a client sends over a WebSocket, before anything is parsed or kept."""

from __future__ import annotations

import asyncio
import contextlib
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState

from serve.config.settings import Limits, WebSocketSettings

BURST_S = 2.0
"""A burst may be as large as this many seconds' worth of the allowed rate."""
FRAMES_PER_MESSAGE = 20
"""Frames allowed per message, as clients split long messages into frames and send pings in between."""
SLICE_BYTES = 4096
"""Frames are counted after every slice of this size, as a single read may hold 40,000 empty frames."""
LINGER_S = 1.0
"""Time for a disconnected client to read the close reason. What it sends meanwhile is discarded."""
TOO_LARGE, BEYOND_RATE = 1009, 1008


class Allowance:
    """A token bucket: `per_s` a second, with bursts of BURST_S seconds' worth or `at_once`, whichever is more."""

    def __init__(self, per_s: float, at_once: float = 0.0) -> None:
        self.per_s = per_s
        self.most = max(at_once, BURST_S * per_s)
        self.left = self.most
        self.since = time.monotonic()

    def take(self, amount: float) -> bool:
        now = time.monotonic()
        self.left = min(self.most, self.left + (now - self.since) * self.per_s) - amount
        self.since = now
        return self.left >= 0


class Messages:
    """Closes a connection at the first message that is too long or exceeds the allowed rate.

    Serve reads ahead from a socket without a bound, so a client that sends too fast can only be disconnected.
    """

    def __init__(self, app: ASGIApp, limits: Limits, settings: WebSocketSettings) -> None:
        self.app = app
        self.max_bytes = limits.max_message_bytes
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            await self.app(scope, receive, send)
            return
        rate, mb_per_s = self.settings.max_messages_per_s, self.settings.max_mb_per_s
        messages, size = Allowance(rate), Allowance(mb_per_s * 2**20, self.max_bytes)
        closed: Message | None = None

        def problem(message: Message) -> tuple[int, str] | None:
            length = len(message.get("bytes") or (message.get("text") or "").encode())
            if length > self.max_bytes:
                return TOO_LARGE, f"a message has {length} bytes, more than {self.max_bytes}"
            if not messages.take(1):
                return BEYOND_RATE, f"more than {rate:g} messages a second"
            if not size.take(length):
                return BEYOND_RATE, f"more than {mb_per_s:g} MB a second"
            return None

        async def receive_bounded() -> Message:
            nonlocal closed
            if closed:
                return closed
            message = await receive()
            if message["type"] == "websocket.receive" and (found := problem(message)):
                code, reason = found
                closed = {"type": "websocket.disconnect", "code": code, "reason": reason}
                with contextlib.suppress(RuntimeError, OSError):  # it may be closed already
                    await send({"type": "websocket.close", "code": code, "reason": reason})
                return closed
            return message

        async def send_unless_closed(message: Message) -> None:
            if closed is None:
                await send(message)

        await self.app(scope, receive_bounded, send_unless_closed)


class BoundedSocket(WebSocketsSansIOProtocol):
    """Uvicorn's WebSocket with a limit on frames, as pings and empty fragments cost work but never reach an app."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.frames_allowed = Allowance(config.max_frames_per_s)  # type: ignore[attr-defined]  # see serve_behind

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), SLICE_BYTES):
            super().data_received(data[start : start + SLICE_BYTES])

    def handle_events(self) -> None:
        if not self.frames_allowed.take(len(self.conn.events)):
            self.conn.fail(BEYOND_RATE, f"more than {self.frames_allowed.per_s:g} frames a second")
            self.handle_parser_exception()
            return
        super().handle_events()

    def handle_parser_exception(self) -> None:
        """Like uvicorn's, but closes the connection LINGER_S later; a reset would overtake the close reason."""
        if self.close_sent or self.conn.close_sent is None:
            return
        code, reason = self.conn.close_sent.code, self.conn.close_sent.reason
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.stop_keepalive()
        self.close_timer = self.loop.call_later(LINGER_S, self.transport.close)
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
