"""Reads each request body in full, within bounds, before anything else handles the request.

Ray Serve itself would buffer bodies without a bound, and a slow sender would occupy one of its request slots.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import errors
from serve.config.settings import Limits
from serve.errors import DureError
from serve.http.endpoints import FOUND, JSON, Endpoint, Found
from serve.http.json_bounds import JsonBounds, checked
from serve.http.requests import SMALL_BYTES

UTF8 = ("", "utf-8", "utf8", "us-ascii", "ascii")
BODY_S, BYTES_PER_S = 20.0, 64 * 1024
"""A body must arrive within `BODY_S`, plus one second for every `BYTES_PER_S` bytes received so far."""


@dataclass(frozen=True)
class Head:
    """What a request's headers say about its body."""

    media: str
    """Content type without parameters; empty if the request has none."""
    content_length: int
    """In bytes; 0 if unknown."""
    has_body: bool
    encoding: str = ""
    """Content-Encoding of the body, such as gzip; empty if there is none."""
    charset: str = ""
    """Of the whole body; empty if the request names none."""

    @classmethod
    def of(cls, scope: Scope) -> Head:
        media, charset, encoding, content_length, chunked = "", "", "", 0, False
        for name, value in scope["headers"]:
            if name == b"content-type":
                kind, options = parse_options_header(value)
                media, charset = kind.decode("latin-1"), options.get(b"charset", b"").decode("latin-1").lower()
            elif name == b"content-length" and value.isdigit():
                content_length = int(value)
            elif name == b"transfer-encoding":
                chunked = True
            elif name == b"content-encoding":
                encoding = value.strip().lower().decode("latin-1")
        has_body = chunked or content_length > 0
        return cls(media, content_length, has_body, "" if encoding == "identity" else encoding, charset)

    @property
    def is_json(self) -> bool:
        return self.media == JSON or (self.media.startswith("application/") and self.media.endswith("+json"))

    def check(self, endpoint: Endpoint) -> None:
        """Raises a 415 if the endpoint does not accept this content type, charset or encoding."""
        if self.encoding:
            message = f"the body's Content-Encoding is {self.encoding[:100]!r}; send it uncompressed"
            raise DureError(415, "unsupported_media_type", message, "Content-Encoding")
        if self.charset not in UTF8 and not self.is_json:  # JSON is UTF-8 whatever its sender calls it
            message = f"the body's charset is {self.charset[:40]!r}; send UTF-8"
            raise DureError(415, "unsupported_media_type", message, "Content-Type")
        if not endpoint.media or self.media in endpoint.media or (JSON in endpoint.media and self.is_json):
            return
        found = f"the body's Content-Type is {self.media[:100]!r}" if self.media else "there is no Content-Type"
        message = f"{found}; send Content-Type: {endpoint.media[0]}"
        raise DureError(415, "unsupported_media_type", message, "Content-Type")


class Budget:
    """Limits the bytes of request bodies that this process holds at once. Small bodies are always accepted."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = 0

    @contextmanager
    def share(self) -> Iterator[Share]:
        """One request's part of the budget, released at the end."""
        share = Share(self)
        try:
            yield share
        finally:
            self.held -= share.held


class Share:
    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.held = 0

    def take(self, count: int) -> None:
        """Reserve `count` more bytes. Raises a 503 if they exceed the budget."""
        if self.held + count > SMALL_BYTES and self.budget.held + count > self.budget.max_bytes:
            raise errors.overloaded("this server", "the request bodies it holds have reached the limit")
        self.held += count
        self.budget.held += count


class Bodies:
    def __init__(self, app: ASGIApp, limits: Limits, budget: Budget) -> None:
        self.app = app
        self.budget = budget
        self.json = JsonBounds.of(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        found: Found | None = scope[FOUND]
        head = Head.of(scope)
        if found and (head.has_body or found.endpoint.body):
            head.check(found.endpoint)
        if not head.has_body:
            await self.app(scope, receive, send)
            return
        max_bytes = found.endpoint.max_bytes if found else SMALL_BYTES
        if head.content_length > max_bytes:
            raise _too_large(max_bytes)
        with self.budget.share() as share:
            parts = await _read(receive, max_bytes, share)
            if head.is_json:
                whole = await checked(parts.popleft() if len(parts) == 1 else b"".join(parts), self.json)
                parts = deque([whole])
                del whole
            await self.app(scope, Replay(parts, receive), send)


class Replay:
    """An ASGI `receive` that replays a body already read, then passes on later messages."""

    def __init__(self, parts: deque[bytes], receive: Receive) -> None:
        self.parts = parts
        self.receive = receive
        self.begun = False

    async def __call__(self) -> Message:
        if not self.parts:
            return await self.receive()
        if self.begun:
            await asyncio.sleep(0)  # forms are parsed part by part; let other tasks run in between
        self.begun = True
        part = self.parts.popleft()
        return {"type": "http.request", "body": part, "more_body": bool(self.parts)}


async def _read(receive: Receive, max_bytes: int, share: Share) -> deque[bytes]:
    """The parts of a body, at least one. Raises DureError or ClientDisconnect."""
    parts: deque[bytes] = deque()
    more = True
    start = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(BODY_S) as timeout:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                part = message.get("body", b"")
                more = message.get("more_body", False)
                if share.held + len(part) > max_bytes:
                    raise _too_large(max_bytes)
                share.take(len(part))
                parts.append(part)
                if more:
                    timeout.reschedule(start + BODY_S + share.held / BYTES_PER_S)
    except TimeoutError as error:
        raise DureError(408, "body_timeout", "the body arrived too slowly; send the request again") from error
    return parts


def _too_large(max_bytes: int) -> DureError:
    return errors.too_large(f"the body is over the limit of {_readable(max_bytes)}")


def _readable(size: int) -> str:
    return f"{size / 2**20:.3g} MB" if size >= 2**20 else f"{size / 2**10:.3g} kB"
