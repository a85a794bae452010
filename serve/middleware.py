"""What every request passes through: its count, and the bounds on its body."""

from __future__ import annotations

import asyncio
import logging
from urllib.parse import quote

import orjson
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import errors
from serve.errors import DureError
from serve.metrics import REQUESTS

logger = logging.getLogger("ray.serve")

CLIENT_LEFT = 499
BODY_PAUSE_S = 30.0
"""A client that sends nothing of its body for this long is sent away."""


class RequestCount:
    """Counts each response, and turns a crash into a plain 500.

    Serve itself writes a line for each response, and its request's id (the client's own `X-Request-ID` or a new one)
    into the response and every log line.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        except Exception:  # the client gets no traceback; the log does
            logger.exception("%s %s failed", scope["method"], quote(scope["path"]))
            if status:
                raise
            await _respond(errors.internal(), send_noted)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            REQUESTS.labels(scope["method"], route, str(status or CLIENT_LEFT)).inc()


class BodyLimit:
    """Refuses a body over the limit with 413, announced or grown too long, and one that stops coming with 408."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = _over(self.max_bytes)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > self.max_bytes:
            await _respond(refusal, send)
            return
        received, complete, over = 0, False, False

        async def receive_counted() -> Message:
            nonlocal received, complete, over, refusal
            try:
                message = await asyncio.wait_for(receive(), None if complete else BODY_PAUSE_S)
            except TimeoutError:
                over, refusal = True, _stopped()
                return {"type": "http.disconnect"}
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            over = over or received > self.max_bytes
            return {"type": "http.disconnect"} if over else message

        async def send_unless_over(message: Message) -> None:
            if not over:
                await send(message)

        try:
            await self.app(scope, receive_counted, send_unless_over)
        except Exception:
            if not over:
                raise
        if over:
            await _respond(refusal, send)


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """The whole body. Raises DureError as BodyLimit answers, and ClientDisconnect."""
    parts: list[bytes] = []
    received = 0
    more = True
    while more:
        try:
            message = await asyncio.wait_for(receive(), BODY_PAUSE_S)
        except TimeoutError as error:
            raise _stopped() from error
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        received += len(parts[-1])
        if received > max_bytes:
            raise _over(max_bytes)
        more = message.get("more_body", False)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _over(max_bytes: int) -> DureError:
    return errors.too_large(f"the body is over the limit of {max_bytes / 2**20:g} MB")


def _stopped() -> DureError:
    return DureError(408, "body_timeout", f"nothing came for {BODY_PAUSE_S:g} s; send again")


async def _respond(error: DureError, send: Send) -> None:
    content = orjson.dumps(errors.body(error.kind, error.message, error.param))
    headers = {"content-type": "application/json", "content-length": str(len(content)), **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
