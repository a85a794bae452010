"""What every request passes through: its log line, its count, and the bound on its body."""

from __future__ import annotations

import logging
import time

import orjson
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import errors
from serve.errors import DureError
from serve.metrics import REQUESTS

logger = logging.getLogger("ray.serve")


class RequestLog:
    """Logs and counts each response under its request's id, and turns a crash into a plain 500.

    The id is Serve's: the client's own `X-Request-ID` or a new one, in the response and in every log line.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        except Exception:  # the client gets no traceback; the log does
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if status:
                raise
            await _respond(errors.internal(), send_noted)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            REQUESTS.labels(scope["method"], route, str(status)).inc()
            seconds = time.perf_counter() - started
            logger.info("%s %s %d %.1f ms", scope["method"], scope["path"], status, 1000 * seconds)


class BodyLimit:
    """Refuses a body over the limit with 413, by its announced length or as soon as it has grown too long."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = errors.too_large(f"the body is over the limit of {self.max_bytes / 2**20:g} MB")
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > self.max_bytes:
            await _respond(refusal, send)
            return
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return {"type": "http.disconnect"} if received > self.max_bytes else message

        async def send_unless_over(message: Message) -> None:
            if received <= self.max_bytes:
                await send(message)

        try:
            await self.app(scope, receive_counted, send_unless_over)
        except Exception:
            if received <= self.max_bytes:
                raise
        if received > self.max_bytes:
            await _respond(refusal, send)


async def _respond(error: DureError, send: Send) -> None:
    content = orjson.dumps(errors.body(error.kind, error.message, error.param))
    headers = {"content-type": "application/json", "content-length": str(len(content)), **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
