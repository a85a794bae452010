"""HEAD requests: the headers that GET would send, without the work for a body."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Scope, Send


async def headers_only(app: ASGIApp, scope: Scope, send: Send) -> None:
    """Answers like GET but without the body; a stream ends before its first event."""
    started = asyncio.Event()

    async def receive_end() -> Message:
        """Reports a disconnect once the headers are sent, which ends streams."""
        await started.wait()
        return {"type": "http.disconnect"}

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            started.set()

    await app({**scope, "method": "GET"}, receive_end, send_head)
