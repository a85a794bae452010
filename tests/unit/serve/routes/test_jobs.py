"""The routes of jobs: when and for which tenant an upload takes a turn, and which requests are refused."""

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
from PIL import Image

from serve.config.model import ModelSettings
from serve.config.settings import Limits, Settings
from serve.http.json_bounds import MAX_DEPTH
from serve.ingress import make_app
from serve.queues.gate import Gate
from serve.routes.adverts import jobs
from serve.services.adverts.jobs import NewJob
from tests.pictures import encoded

URL = f"/api/yh/jobs/{uuid.uuid4()}/variants/{uuid.uuid4()}/overlay"
JSON = json.dumps({"tenant_id": "acme", "layout": {"a": 1}}).encode(), "application/json"
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="tenant_id"\r\n\r\nacme\r\n'
    b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nPNG\r\n--x--\r\n',
    "multipart/form-data; boundary=x",
)


class Adverts:
    """Records what it is called with, and which tenants have turns in the queue at that moment."""

    name = "adverts"

    def __init__(self) -> None:
        self.gate = Gate("adverts", 4)
        self.calls: list[tuple[dict[str, int], bytes, Any]] = []
        self.jobs: list[NewJob] = []

    async def call(self, *arguments: Any, method: str, **_: Any) -> Any:
        if method == "record_overlay":
            _which, _overlay_id, _image, content, layout = arguments
            self.calls.append((dict(self.gate.turns_of), content, layout))
        elif method == "create_job":
            self.jobs.append(arguments[0])
        return {}


@pytest.mark.parametrize(("body", "sent"), [(JSON, (b"", {"a": 1})), (FORM, (b"PNG", None))], ids=["JSON", "form"])
def test_a_slow_upload_takes_no_turn_and_then_one_of_the_tenant_in_its_body(
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


def post(adverts: Adverts, *requests: tuple[str, bytes, dict[bytes, bytes]]) -> list[httpx.Response]:
    """The whole app's responses to requests of a path, a body and headers."""
    settings = Settings(models={"vision": ModelSettings(task="vision", source="x")})
    graph: Any = SimpleNamespace(settings=settings, models={}, services={}, service=lambda *_: adverts)
    app = make_app(graph)

    async def scenario() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://dure") as client:
            return [await client.post(path, content=body, headers=headers) for path, body, headers in requests]

    return asyncio.run(scenario())


def nested(times: int, opening: str, closing: str) -> bytes:
    return f'{{"tenant_id": "acme", "layout": {{"a": {opening * times}1{closing * times}}}}}'.encode()


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_a_layout_that_is_nested_too_deeply_is_refused(opening: str, closing: str) -> None:
    adverts = Adverts()
    each = opening.count("[") + opening.count("{")
    fits = (MAX_DEPTH - 2) // each  # beside the body and the layout itself
    bodies = [nested(times, opening, closing) for times in (fits, fits + 1, 1000 // each, 20_000)]
    answers = post(adverts, *((URL, body, {b"Content-Type": b"application/json"}) for body in bodies))
    assert [answer.status_code for answer in answers] == [200, 400, 400, 400]
    assert all("nested" in answer.json()["error"]["message"] for answer in answers[1:])
    assert len(adverts.calls) == 1


@pytest.mark.parametrize("charset", [b"undefined", b"punycode", b"idna", b"unicode_escape", b"utf-16", b"nonsense"])
@pytest.mark.parametrize("value", [b"\xff\xfe", b"\\ud800", b"a\0b", b"\xed\xa0\x80"])
def test_any_charset_or_text_in_a_form_is_refused_without_failing(charset: bytes, value: bytes) -> None:
    headers = {b"Content-Type": b"multipart/form-data; boundary=x; charset=" + charset}
    body = FORM[0].replace(b"acme", value)
    described = (
        FORM[0]
        .replace(b"PNG", encoded(Image.new("L", (2, 2))))
        .replace(
            b"--x\r\n", b'--x\r\nContent-Disposition: form-data; name="desc_eng"\r\n\r\n' + value + b"\r\n--x\r\n", 1
        )
    )
    adverts = Adverts()
    answers = post(adverts, (URL, body, headers), ("/api/yh/jobs", body, headers), ("/api/yh/jobs", described, headers))
    assert {answer.status_code for answer in answers} == {415}


@pytest.mark.parametrize(
    ("number", "why"),
    [("18446744073709551616", "64 bits"), ("-9223372036854775809", "64 bits"), ("1e400", "finite"), ("NaN", "finite")],
)
def test_a_layout_with_a_number_that_no_answer_could_repeat_is_refused(number: str, why: str) -> None:
    body = f'{{"tenant_id": "acme", "layout": {{"a": [{{"x": {number}}}]}}}}'.encode()
    adverts = Adverts()
    [answer] = post(adverts, (URL, body, {b"Content-Type": b"application/json"}))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "layout.a.0.x")
    assert why in answer.json()["error"]["message"]
    assert not adverts.calls


@pytest.mark.parametrize("key", [b"a\x00b", b"\x1b[31m", b"a\tb", b"a" * 256, b""])
def test_an_idempotency_key_is_a_line_of_text(key: bytes) -> None:
    body = FORM[0].replace(b"PNG", encoded(Image.new("L", (2, 2))))
    headers = {b"Content-Type": FORM[1].encode()}
    refused, accepted = post(
        Adverts(),
        ("/api/yh/jobs", body, headers | {b"Idempotency-Key": key}),
        ("/api/yh/jobs", body, headers | {b"Idempotency-Key": b"caf\xe9 1"}),
    )
    assert refused.status_code == 422
    assert accepted.status_code == 201


@pytest.mark.parametrize("path", ["/v1/vision/judge", "/v1/vision/validate"])
def test_an_unknown_model_name_is_not_echoed(path: str) -> None:
    field = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    body = field % (b"model", b"x" * 100_000) + field % (b"ad_copy_text", b"a") + FORM[0]
    [answer] = post(Adverts(), (path, body, {b"Content-Type": FORM[1].encode()}))
    assert answer.status_code == 422
    assert len(answer.content) < 500


COPY = "오늘의 특가, 커피 한 잔"


def part(name: str, value: bytes, *headers: str) -> bytes:
    head = "".join(f"\r\n{header}" for header in headers)
    return f'--x\r\nContent-Disposition: form-data; name="{name}"{head}\r\n\r\n'.encode() + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    picture = b'--x\r\nContent-Disposition: form-data; name="image"; filename="\xb1\xa4\xb0\xed.png"\r\n\r\n'
    return b"".join(parts) + picture + encoded(Image.new("L", (2, 2))) + b"\r\n--x--\r\n"


@pytest.mark.parametrize(
    ("value", "headers"),
    [
        (COPY.encode("cp949"), ()),
        (COPY.encode("utf-16"), ()),
        ("café".encode("latin-1"), ()),
        (COPY.encode()[:-1], ()),
        (COPY.encode("cp949"), ("Content-Type: text/plain; charset=utf-8",)),
        (COPY.encode(), ("Content-Type: text/plain; charset=nonsense",)),
        (b"\xff\xfe\xff", ("Content-Type: text/plain; charset=euc-kr",)),
    ],
)
def test_form_text_in_another_encoding_is_refused_with_the_field_named(value: bytes, headers: tuple[str, ...]) -> None:
    sent = {b"Content-Type": b"multipart/form-data; boundary=x"}
    adverts = Adverts()
    job = form(part("tenant_id", b"acme"), part("desc_eng", value, *headers))
    copy = form(part("ad_copy_text", value, *headers))
    answers = post(adverts, ("/api/yh/jobs", job, sent), ("/v1/vision/validate", copy, sent))
    assert [answer.status_code for answer in answers] == [400, 400]
    params = [answer.json()["error"].get("param") for answer in answers]
    assert params == ["desc_eng", "ad_copy_text"]
    assert all("send UTF-8" in answer.json()["error"]["message"] for answer in answers)


@pytest.mark.parametrize(
    ("value", "headers"),
    [
        (COPY.encode(), ()),
        (COPY.encode(), ("Content-Type: text/plain; charset=UTF-8",)),
        (COPY.encode("euc-kr"), ("Content-Type: text/plain; charset=euc-kr",)),
        (COPY.encode("cp949"), ('Content-Type: text/plain; charset="cp949"',)),
    ],
)
def test_form_text_is_read_in_the_charset_that_its_part_names(value: bytes, headers: tuple[str, ...]) -> None:
    adverts = Adverts()
    sent = {b"Content-Type": b"multipart/form-data; boundary=x"}
    [answer] = post(
        adverts, ("/api/yh/jobs", form(part("tenant_id", b"acme"), part("desc_eng", value, *headers)), sent)
    )
    assert answer.status_code == 201, answer.text
    assert adverts.jobs[-1].desc_eng == COPY
