"""Bodies that are too long, too slow, too deep or of another kind, over real connections."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI, Form
from PIL import Image

from serve.config.settings import Limits
from serve.http import bodies
from serve.http.endpoints import Endpoints
from serve.http.requests import Body
from tests.ingress import Heard, Running, held_back, json_endpoints, running

JSON = "Content-Type: application/json"
ORIGIN = "https://app.example.org"
EMBED, EMBED_BODY = "/v1/embeddings", b'{"input": "a"}'
LIMITS = {"max_body_mb": 3, "max_bodies_mb": 4, "max_text_chars": 20_000}
ENDPOINTS = json_endpoints()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(limits=LIMITS, ingress={"cors_origins": [ORIGIN]}, request_timeout_s=20) as started:
        yield started


@pytest.mark.parametrize(("path", "model"), ENDPOINTS)
@pytest.mark.parametrize("sent", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_json_endpoints_say_which_content_type_they_take(
    server: Running, path: str, model: type[Body], sent: str
) -> None:
    answer = server.post(path, EMBED_BODY, *([f"Content-Type: {sent}"] if sent else []))
    assert answer.status == 415
    assert "send Content-Type: application/json" in answer.error["message"]


@pytest.mark.parametrize("sent", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json"])
def test_other_spellings_of_json_are_served(server: Running, sent: str) -> None:
    assert server.post(EMBED, EMBED_BODY, f"Content-Type: {sent}").status == 200


@pytest.mark.parametrize("sent", ["application/json", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize(
    "path", ["/v1/vision/judge", "/api/yh/jobs", f"/api/yh/jobs/{'0' * 32}/variants/{'0' * 32}/overlay"]
)
def test_endpoints_with_files_take_multipart(server: Running, path: str, sent: str) -> None:
    answer = server.post(path, b"a=b&" * 100, f"Content-Type: {sent}")
    if path.endswith("overlay") and sent == "application/json":  # which takes JSON, too
        assert answer.status == 422
        return
    assert answer.status == 415
    assert "multipart/form-data" in answer.error["message"]


@pytest.mark.parametrize("path", [EMBED, "/predict", "/v1/rerank", "/v1/models/shout/run"])
def test_another_encoding_is_told_so_with_and_without_an_origin(server: Running, path: str) -> None:
    body = '{"input": "보증금", "text": "보증금"}'.encode("cp949")
    origins: list[list[str]] = [[], ["Origin: https://elsewhere.example"], [f"Origin: {ORIGIN}"]]
    answers = [server.post(path, body, JSON, *origin) for origin in origins]
    assert [answer.status for answer in answers] == [400] * 3
    assert answers[0].content == answers[1].content == answers[2].content
    assert "not UTF-8" in answers[0].error["message"]
    assert answers[2].headers["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/models/shout/reload", b'{"\\ud800": 1}', None),
        ("/v1/models/shout/run", b'{"items": [1, {"say": "a\\udfff"}]}', "items.1.say"),
        ("/v1/models/shout/run", b'{"items": [{"\\ud800": 1}]}', "items.0"),
        (EMBED, b'{"input": "a", "model": "\\ud800"}', "model"),
        (EMBED, b'{"input": ["\\ud83d\\ude00", "\\ude00\\ud83d"]}', "input.1"),
        ("/v1/rerank", b'{"query": "a", "documents": ["\\ud800"]}', "documents.0"),
        ("/predict", b'{"text": "\\ud800"}', "text"),
    ],
)
def test_half_a_surrogate_pair_is_named(server: Running, path: str, body: bytes, param: str | None) -> None:
    answer = server.post(path, body, JSON)
    assert (answer.status, answer.error.get("param")) == (400, param)
    assert "surrogate" in answer.error["message"]


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "deflate, gzip"])
def test_compressed_bodies_are_told_so(server: Running, encoding: str) -> None:
    answer = server.post(EMBED, b"\x1f\x8b\x08", JSON, f"Content-Encoding: {encoding}")
    assert (answer.status, answer.error["param"]) == (415, "Content-Encoding")
    assert server.post(EMBED, EMBED_BODY, JSON, "Content-Encoding: identity").status == 200


def test_a_byte_order_mark_is_no_harm(server: Running) -> None:
    assert server.post(EMBED, EMBED_BODY.decode().encode("utf-8-sig"), JSON).status == 200


@pytest.mark.parametrize(("path", "model"), ENDPOINTS)
@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"items":[', b'{"input":[['])
def test_deeply_nested_json_is_refused_everywhere(
    server: Running, path: str, model: type[Body], opening: bytes
) -> None:
    depth = 4000 // len(opening)
    answer = server.post(path, opening * depth, JSON)
    assert (answer.status, answer.error.get("type", "invalid_request")) == (400, "invalid_request")
    assert "nested" in answer.error["message"]


def test_a_cursor_can_be_no_deep_json(server: Running) -> None:
    answer = server.ask("GET", f"/api/yh/traces?tenant_id=a&after={'W1tb' * 2000}")
    assert (answer.status, answer.error["param"]) == (400, "after")


@pytest.mark.parametrize(
    ("path", "size", "told"),
    [
        ("/v1/models/shout/reload", 5_000, "4 kB"),
        ("/predict", 300_000, "238 kB"),
        (EMBED, 4 * 2**20, "3 MB"),
        ("/nowhere", 70_000, "64 kB"),
        ("/v1/vision/judge", 4 * 2**20, "3 MB"),
    ],
)
@pytest.mark.parametrize("announced", [True, False])
def test_each_endpoint_has_its_own_limit(server: Running, path: str, size: int, told: str, announced: bool) -> None:
    kind = "Content-Type: multipart/form-data; boundary=b" if "vision" in path else JSON
    if announced:
        answer = server.post(path, b"x" * size, kind)
    else:
        part = b"%x\r\n" % 50_000 + b"x" * 50_000 + b"\r\n"
        answer = server.ask(
            "POST", path, "Transfer-Encoding: chunked", kind, body=part * (1 + size // 50_000) + b"0\r\n\r\n"
        )
    assert (answer.status, answer.error["type"]) == (413, "too_large")
    assert told in answer.error["message"]


def test_under_a_route_prefix_the_limits_are_the_same(server: Running) -> None:
    answer = server.post("/dure/v1/models/shout/reload", b"x" * 5000, JSON)
    assert (answer.status, "4 kB" in answer.error["message"]) == (413, True)


def test_a_text_at_its_limit_passes_however_it_is_written(server: Running) -> None:
    for text in ("가" * 20_000, "😀" * 20_000):
        for ascii in (True, False):
            body = json.dumps({"text": text}, ensure_ascii=ascii).encode()
            assert server.post("/predict", body, JSON).status == 200


@pytest.mark.parametrize(
    "body",
    [
        {"input": ["moderately long, as clauses are: " * 30] * 2048},
        {"input": [[12345] * 200] * 2048},
        {"input": list(range(400_000))},
    ],
)
def test_lists_at_their_limit_pass(server: Running, body: dict[str, Any]) -> None:
    answer = server.post(EMBED, json.dumps(body).encode(), JSON)
    too_many_tokens = isinstance(body["input"][0], int)
    assert answer.status == (413 if too_many_tokens else 200)
    assert not too_many_tokens or "tokens" in answer.error["message"]


@pytest.mark.parametrize("part", [b"", b" "])
def test_a_body_that_comes_too_slowly_is_refused(server: Running, part: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_S", 0.5)
    head = f"POST {EMBED} HTTP/1.1\r\nHost: dure\r\n{JSON}\r\nContent-Length: 1000\r\n\r\n"
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(head.encode())
        connection.settimeout(0.1)
        received = b""
        while b"body_timeout" not in received:
            assert time.monotonic() - started < 5
            connection.sendall(part)
            try:
                received += connection.recv(65536)
            except TimeoutError:
                continue
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in received


def test_a_body_that_comes_at_a_fair_pace_may_take_longer(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_S", 0.5)
    body = json.dumps({"input": ["x" * 10_000] * 12}).encode()
    head = f"POST {EMBED} HTTP/1.1\r\nHost: dure\r\n{JSON}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(head.encode())
        for start in range(0, len(body), 12_000):
            connection.sendall(body[start : start + 12_000])
            time.sleep(0.08)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_bodies_in_flight_are_bounded_and_small_ones_pass(server: Running) -> None:
    large, rest, small = (json.dumps({"items": ["x" * size]}).encode() for size in (2_600_000, 1_500_000, 60_000))
    path, budget, answers, sending = "/v1/models/shout/run", server.app.border.budget, list[Heard](), []

    def post(body: bytes) -> None:
        answers.append(server.post(path, body, JSON))

    with held_back(server, "shout"):
        for body in (large, rest, small, small):
            expected = budget.held + len(body)
            sending.append(threading.Thread(target=post, args=(body,)))
            sending[-1].start()
            deadline = time.monotonic() + 5
            while budget.held != expected:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        refused = server.post(path, large, JSON)
        assert (refused.status, refused.error["type"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert server.post(EMBED, EMBED_BODY, JSON).status == 200
    for thread in sending:
        thread.join(10)
    assert [answer.status for answer in answers] == [200] * 4
    assert budget.held == 0


@pytest.mark.parametrize("model", [None, "", "vision"])
def test_an_empty_field_of_a_form_is_the_same_as_leaving_it_out(server: Running, model: str | None) -> None:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    data = {} if model is None else {"model": model}
    answer = httpx.post(f"{server.url}/v1/vision/judge", files={"image": image.getvalue()}, data=data, timeout=10)
    assert answer.status_code == 200, answer.text


def test_forms_without_files_may_be_sent_as_browsers_do_and_are_short() -> None:
    app = FastAPI()

    @app.post("/form")
    async def form(name: Annotated[str, Form()]) -> str:
        return name

    found = Endpoints(app, Limits()).find({"type": "http", "method": "POST", "path": "/form"})
    assert found
    assert "application/x-www-form-urlencoded" in found.endpoint.media
    assert found.endpoint.max_bytes < 100_000


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(
            f"POST {EMBED} HTTP/1.1\r\nHost: d\r\n{JSON}\r\nContent-Length: 99999\r\n\r\n{'x' * 999}".encode()
        )
        deadline = time.monotonic() + 5
        while not server.app.border.budget.held:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    while server.app.border.budget.held:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "body",
    [
        {"input": "a", "encoding_format": None, "truncate": None, "dimensions": None, "model": None},
        {"input": ["a", "b"], "user": None, "encoding_format": None},
    ],
)
def test_null_is_served(server: Running, body: dict[str, Any]) -> None:
    assert server.post(EMBED, json.dumps(body).encode(), JSON).status == 200
