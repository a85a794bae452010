"""Cleans a request's headers and path before anything else reads them, Ray Serve included."""

from __future__ import annotations

import functools
import re
import uuid

from ray.serve._private.constants import (
    SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
    SERVE_HTTP_REQUEST_ID_HEADER,
    SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
    SERVE_INGRESS_ROUTER_HEADER_PREFIX,
    SERVE_MULTIPLEXED_MODEL_ID,
    SERVE_SESSION_ID,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.caller import TIMEOUT_HEADER

REQUEST_ID = SERVE_HTTP_REQUEST_ID_HEADER.encode()
USABLE_ID = re.compile(rb"[!-~]{1,128}")
"""One word of printable ASCII, as the id goes into log lines and the response."""
VALID = {
    b"traceparent": re.compile(rb"[ -~]*"),  # Serve decodes these two as UTF-8 and fails on anything else
    b"tracestate": re.compile(rb"[ -~]*"),
    b"x-forwarded-for": re.compile(rb"[0-9a-fA-F.:,\[\] ]*"),  # addresses only, as Serve may log them
}
"""Headers that are dropped unless their value matches."""
RENAMED = {SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER.encode(): TIMEOUT_HEADER.lower().encode()}
"""Serve would answer a timeout in plain text and fails on values such as `inf`. Dure enforces the deadline itself."""


def _spelling(name: str) -> bytes:
    """Serve treats dashes and underscores in these names alike."""
    return name.lower().replace("-", "_").encode()


PRIVATE = {
    _spelling(SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER),  # keeps calls running after their client has left
    _spelling(SERVE_MULTIPLEXED_MODEL_ID),  # routes by a model id that only the client knows
    _spelling(SERVE_SESSION_ID),  # ties a client to one replica
}
PRIVATE_PREFIX = _spelling(SERVE_INGRESS_ROUTER_HEADER_PREFIX)  # internal to Serve's routers
SLASHES = re.compile("/{2,}")


class Tidy:
    """Cleans the head of each request, and adds its id to the response if Serve has not."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        request_id = tidy(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                headers = list(message.get("headers", ()))
                if all(name.lower() != REQUEST_ID for name, _ in headers):
                    message = {**message, "headers": [*headers, (REQUEST_ID, request_id)]}
            await send(message)

        await self.app(scope, receive, send_with_id)


def tidy(scope: Scope) -> bytes:
    """Clean a scope's headers and path in place; returns the request's id.

    Headers internal to Serve are dropped. An unusable request id is replaced, since the id only serves to trace the
    request and is no reason to fail it. Repeated slashes become one, as clients produce them when joining a base URL
    and a path; `raw_path` stays unchanged.
    """
    request_id = b""
    headers: list[tuple[bytes, bytes]] = []
    for name, value in scope["headers"]:
        if name == REQUEST_ID:
            request_id = request_id or value
        elif not _is_private(name) and (name not in VALID or VALID[name].fullmatch(value)):
            headers.append((RENAMED.get(name, name), value))
    if not USABLE_ID.fullmatch(request_id):
        request_id = str(uuid.uuid4()).encode()
    scope["headers"] = [*headers, (REQUEST_ID, request_id)]
    if "//" in scope["path"]:
        scope["path"] = SLASHES.sub("/", scope["path"])
    return request_id


@functools.lru_cache(maxsize=256)
def _is_private(name: bytes) -> bool:
    spelled = name.replace(b"-", b"_")
    return spelled in PRIVATE or spelled.startswith(PRIVATE_PREFIX)
