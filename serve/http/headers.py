"""What of a request's head is put right before anything else reads it, Ray Serve included."""

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
"""One word of printable ASCII: it goes into log lines and into the response."""
MEANT = {
    b"traceparent": re.compile(rb"[ -~]*"),  # Serve reads these two as UTF-8, and fails on anything else
    b"tracestate": re.compile(rb"[ -~]*"),
    b"x-forwarded-for": re.compile(rb"[0-9a-fA-F.:,\[\] ]*"),  # addresses, which Serve may log
}
"""Headers that are dropped where they hold anything else."""
RENAMED = {SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER.encode(): TIMEOUT_HEADER.lower().encode()}
"""Serve would end the request in plain text, and trips over values such as `inf`. Dure keeps the deadline itself."""


def _spelling(name: str) -> bytes:
    """Serve takes dashes and underscores in these names for the same."""
    return name.lower().replace("-", "_").encode()


PRIVATE = {
    _spelling(SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER),  # lets calls run on that nobody waits for
    _spelling(SERVE_MULTIPLEXED_MODEL_ID),  # chooses replicas by a model's name that only its client knows
    _spelling(SERVE_SESSION_ID),  # ties a client to one replica
}
PRIVATE_PREFIX = _spelling(SERVE_INGRESS_ROUTER_HEADER_PREFIX)  # how Serve's routers talk to each other
SLASHES = re.compile("/{2,}")


class Tidy:
    """Puts the head of each request right, and its id into the response where Serve has not done so."""

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

    Headers that are Serve's own affair are dropped. An id that can't be used is replaced: it is there to find a
    request again, and no reason to fail it. Slashes after slashes are one, as clients write that join a base URL with
    a path; `raw_path` stays as it was sent.
    """
    request_id = b""
    headers: list[tuple[bytes, bytes]] = []
    for name, value in scope["headers"]:
        if name == REQUEST_ID:
            request_id = request_id or value
        elif not _is_private(name) and (name not in MEANT or MEANT[name].fullmatch(value)):
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
