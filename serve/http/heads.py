"""HEAD: the headers that GET would have, and none of its work beyond them."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Scope, Send


async def headers_only(app: ASGIApp, scope: Scope, send: Send) -> None:
    """Answers as the app answers GET, without the body; a stream ends where it would begin."""
    started = asyncio.Event()

    async def receive_end() -> Message:
        """As if the client left once it has the headers: that ends what would go on."""
        await started.wait()
        return {"type": "http.disconnect"}

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            started.set()

    await app({**scope, "method": "GET"}, receive_end, send_head)
