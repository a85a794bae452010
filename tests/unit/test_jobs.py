"""Adverts as jobs: whom a finished advert's place in the queue is counted for, and from when."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve.lanes.gate import Gate
from serve.routes import jobs
from serve.settings import Limits

URL = f"/api/yh/jobs/{uuid.uuid4()}/variants/{uuid.uuid4()}/overlay"
JSON = json.dumps({"tenant_id": "acme", "layout": {"a": 1}}).encode(), "application/json"
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="tenant_id"\r\n\r\nacme\r\n'
    b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nPNG\r\n--x--\r\n',
    "multipart/form-data; boundary=x",
)


class Adverts:
    """Notes what it is called with, and whose places in the queue are taken then."""

    name = "adverts"

    def __init__(self) -> None:
        self.gate = Gate("adverts", 4)
        self.calls: list[tuple[dict[str, int], bytes, Any]] = []

    async def call(self, which: Any, overlay_id: Any, image: Any, content: bytes, layout: Any, **_: Any) -> Any:
        self.calls.append((dict(self.gate.turns_of), content, layout))
        return {}


@pytest.mark.parametrize(("body", "sent"), [(JSON, (b"", {"a": 1})), (FORM, (b"PNG", None))], ids=["JSON", "form"])
def test_a_slow_upload_holds_no_place_and_the_tenant_is_the_bodys(
    body: tuple[bytes, str], sent: tuple[bytes, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def image(*_: Any) -> None: ...

    monkeypatch.setattr(jobs, "_image", image)
    content, media_type = body
    adverts = Adverts()
    app = FastAPI()
    app.include_router(jobs.router)
    settings = SimpleNamespace(limits=Limits(), request_timeout_s=5)
    app.state.graph = SimpleNamespace(settings=settings, service=lambda *_: adverts)
    held: list[int] = []

    async def slowly() -> AsyncIterator[bytes]:
        for at in range(0, len(content), 40):
            yield content[at : at + 40]
            await asyncio.sleep(0.001)
            held.append(adverts.gate.items)

    async def scenario() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://dure") as client:
            response = await client.post(URL, content=slowly(), headers={"Content-Type": media_type})
        assert response.json() == {}

    asyncio.run(scenario())
    assert set(held) == {0}
    assert adverts.calls == [({"acme": 1}, *sent)]
