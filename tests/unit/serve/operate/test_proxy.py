"""Serve's own proxy, which is told by an environment variable what to call before it serves."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
import uvicorn
from ray.serve._private import http_util
from ray.serve._private.utils import call_function_from_import_path
from ray.serve.config import HTTPOptions
from starlette.types import Receive, Scope, Send
from uvicorn.config import Config

from serve.operate.environment import EVERYWHERE
from tests.dure import free_port

CALLBACK = EVERYWHERE["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]


@pytest.fixture(autouse=True)
def as_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn, "Config", Config)


async def tell(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the path and the headers that it got."""
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    content = json.dumps({"path": scope["path"], "headers": headers}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": content})


def test_a_proxy_takes_no_headers_that_are_serves_own() -> None:
    async def scenario() -> None:
        http_util.validate_http_proxy_callback_return(call_function_from_import_path(CALLBACK))
        options = HTTPOptions(host="127.0.0.1", port=free_port())
        loop = asyncio.get_running_loop()
        task, server = await http_util.start_asgi_http_server(tell, options, event_loop=loop)
        while not server.started:
            await asyncio.wait((task,), timeout=0.01)
        headers = {"x-request-disconnect-disabled": "?1", "x-request-timeout-seconds": "2", "X-Request-ID": b"\xff"}
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"http://127.0.0.1:{options.port}//a//b", headers=headers)  # type: ignore[arg-type]
        seen = answer.json()
        assert seen["path"] == "/a/b"
        assert seen["headers"]["x-request-timeout"] == "2"
        assert {"x-request-disconnect-disabled", "x-request-timeout-seconds"}.isdisjoint(seen["headers"])
        assert answer.headers.get_list("x-request-id") == [seen["headers"]["x-request-id"]]
        assert server.config.ws_per_message_deflate is False
        server.should_exit = True
        await asyncio.wait((task,), timeout=5)

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_an_ingress_keeps_the_border_that_it_has() -> None:
    class Bounded(Config):
        pass

    uvicorn.Config = Bounded  # type: ignore[misc]
    assert call_function_from_import_path(CALLBACK) == []
    assert uvicorn.Config is Bounded
