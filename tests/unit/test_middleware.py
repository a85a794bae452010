from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from serve import middleware
from serve.errors import DureError
from serve.middleware import BodyLimit, read_body

LIMIT = 10


async def length(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the length of the body that it was sent."""
    await JSONResponse(len(await Request(scope, receive).body()))(scope, receive, send)


async def short_way(scope: Scope, receive: Receive, send: Send) -> None:
    """The same without the middleware."""
    try:
        response = JSONResponse(len(await read_body(receive, LIMIT)))
    except DureError as error:
        response = JSONResponse({"error": {"type": error.kind}}, error.status)
    await response(scope, receive, send)


@pytest.fixture(params=[BodyLimit(length, LIMIT), short_way], ids=["middleware", "short way"])
def app(request: pytest.FixtureRequest) -> Any:
    return request.param


def post(app: Any, *parts: bytes, complete: bool = True, **headers: str) -> tuple[int, Any]:
    """Status and JSON that the app answers with to a body that comes in parts, and may never end."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if complete:
        messages[-1]["more_body"] = False
    sent: list[Message] = []

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": raw}
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 5))
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_a_body_within_the_limit_passes(app: Any) -> None:
    assert post(app, b"12345", b"67890") == (200, 10)


def test_a_body_over_the_limit_is_refused(app: Any) -> None:
    status, content = post(app, b"12345", b"678901")
    assert (status, content["error"]["type"]) == (413, "too_large")


def test_a_body_that_is_announced_over_the_limit_is_not_read() -> None:
    status, content = post(BodyLimit(length, LIMIT), b"123", content_length="11")
    assert (status, content["error"]["type"]) == (413, "too_large")


def test_a_body_that_stops_coming_is_refused(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_PAUSE_S", 0.05)
    status, content = post(app, b"123", complete=False)
    assert (status, content["error"]["type"]) == (408, "body_timeout")
