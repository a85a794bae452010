"""What every request crosses, over real connections to the server that Serve makes."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve.errors import DureError
from serve.http.border import Refusals
from serve.http.endpoints import FOUND, Found
from tests.ingress import Running, any_of, held_back, running

JSON = "Content-Type: application/json"
ORIGIN = "https://app.example.org"
EMBED, EMBED_BODY = "/v1/embeddings", b'{"input": "a"}'


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ingress={"cors_origins": [ORIGIN]}, request_timeout_s=20) as started:
        yield started


def test_a_crash_behind_any_endpoint_is_told_in_the_one_shape(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def crash(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(type(server.graph.lanes), "queues", crash)
    failed = server.ask("GET", "/v1/queues")
    assert (failed.status, failed.error["type"]) == (500, "internal")
    assert "secret" not in failed.error["message"]


@pytest.mark.parametrize("path", ["//v1/embeddings", "/v1//embeddings", "///v1///embeddings", "/v1/%2Fembeddings"])
def test_doubled_slashes_are_one(server: Running, path: str) -> None:
    assert server.post(path, EMBED_BODY, JSON).status == 200


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("//v1/nowhere", "//v1/nowhere"),
        ("/v1/%0aINFO%20x", "/v1/%0aINFO%20x"),
        ("/a?b=c", "/a"),
        ("/a/v1/embeddings", "/a/v1/embeddings"),
        ('/"<b>', "/%22%3Cb%3E"),
        ("/" + "x" * 5000, "/" + "x" * 199),
    ],
)
def test_an_unknown_path_is_named_as_it_was_sent(server: Running, path: str, told: str) -> None:
    answer = server.post(path, EMBED_BODY, JSON)
    assert (answer.status, answer.error["message"]) == (404, f"POST {told}: Not Found; see GET /docs")


@pytest.mark.parametrize(
    "path", ["/health", "/health/live", "/v1/models", "/v1/models/embedder", "/docs", "/openapi.json"]
)
def test_head_is_get_without_the_body(server: Running, path: str) -> None:
    got, head = server.ask("GET", path), server.ask("HEAD", path)
    assert (head.status, head.content) == (200, b"")
    assert head.headers.keys() == got.headers.keys()
    assert head.headers["content-length"] == got.headers["content-length"] != "0"


@pytest.mark.parametrize(("path", "status"), [("/v1/models/nothing", 404), ("/nowhere", 404), ("/predict", 405)])
def test_head_fails_as_get_does(server: Running, path: str, status: int) -> None:
    assert server.ask("HEAD", path).status == server.ask("GET", path).status == status


def test_head_is_among_the_methods_that_are_allowed(server: Running) -> None:
    assert server.post("/health", b"").headers["allow"] == "GET, HEAD"


def test_head_of_a_stream_leaves_nothing_running(server: Running) -> None:
    for _ in range(3):
        head = server.ask("HEAD", "/model/upload-stream?follow=true")
        assert (head.status, head.content) == (200, b"")
        assert head.headers["content-type"].startswith("text/event-stream")
    deadline = time.monotonic() + 5
    while server.graph.watch._subscribers:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("sent", ["mine", "a-b_c.d:e/f=", "x" * 128])
def test_a_request_keeps_its_id(server: Running, sent: str) -> None:
    for path, body in ((EMBED, EMBED_BODY), (EMBED, b"["), ("/nowhere", b"")):
        assert server.post(path, body, JSON, f"X-Request-ID: {sent}").headers["x-request-id"] == sent


@pytest.mark.parametrize("sent", ["\xff", "", "two words", "\t", "é", "x" * 129, "보".encode().decode("latin-1")])
def test_an_id_that_cannot_be_used_is_replaced(server: Running, sent: str) -> None:
    answers = [server.post(path, EMBED_BODY, JSON, f"X-Request-ID: {sent}") for path in (EMBED, EMBED, "/nowhere")]
    assert [answer.status for answer in answers] == [200, 200, 404]
    assert len({answer.headers["x-request-id"] for answer in answers} - {sent}) == 3


PRIVATE = [
    "x-request-disconnect-disabled: ?1",
    "X-Request-Disconnect-Disabled: \xff",
    "x-session-id: \xff",
    "X_Session_Id: someone",
    "serve_multiplexed_model_id: \xff",
    "serve-multiplexed-model-id: embedder",
    "x-serve-router-target: somewhere",
    "traceparent: \xff",
    'X-Forwarded-For: 10.0.0.1" INFO forged',
]


@pytest.mark.parametrize("header", PRIVATE)
def test_serves_own_headers_are_not_a_clients_to_send(
    server: Running, header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    take = server.app._take

    async def look(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(name for name, _ in scope["headers"])
        await take(scope, receive, send)

    monkeypatch.setattr(server.app, "_take", look)
    kept = ["X-Other: \xff", "Tracestate: a=b", "X-Forwarded-For: 10.0.0.1, [::1]:80"]
    sent = [each for each in kept if each.partition(":")[0] != header.partition(":")[0]]
    assert server.post(EMBED, EMBED_BODY, JSON, header, *sent).status == 200
    assert {each.partition(":")[0].lower().encode() for each in sent} <= set(seen)
    assert header.partition(":")[0].lower().encode() not in seen


@pytest.mark.parametrize("value", ["inf", "1e999", "-1", "0", "nan", "soon", "\xff"])
@pytest.mark.parametrize("name", ["x-request-timeout-seconds", "X-Request-Timeout"])
def test_a_timeout_that_means_nothing_is_refused(server: Running, name: str, value: str) -> None:
    answer = server.post(EMBED, EMBED_BODY, JSON, f"{name}: {value}")
    assert (answer.status, answer.error["param"]) == (400, "X-Request-Timeout")


@pytest.mark.parametrize("name", ["x-request-timeout-seconds", "X-Request-Timeout"])
def test_a_deadline_is_answered_by_dure(server: Running, name: str) -> None:
    with held_back(server, "embedder"):
        answer = server.post(EMBED, EMBED_BODY, JSON, f"{name}: 0.2")
    assert (answer.status, answer.error["type"]) == (504, "deadline_exceeded")


def test_what_is_refused_early_is_not_read(server: Running) -> None:
    head = f"POST {EMBED} HTTP/1.1\r\nHost: dure\r\n{JSON}\r\nExpect: 100-continue\r\nConnection: close\r\n"
    too_long = server.raw(f"{head}Content-Length: 99999999\r\n\r\n".encode())
    assert too_long.startswith(b"HTTP/1.1 413 ")
    with held_back(server, "embedder"):
        threads = [
            threading.Thread(target=server.post, args=(EMBED, EMBED_BODY, JSON, "X-Request-Timeout: 3"))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 5
        while server.graph.models["embedder"].gate.items < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        full = server.raw(f"{head}Content-Length: 14\r\n\r\n".encode())
        with_ticket = server.raw(f"{head}X-Dure-Ticket: mine\r\nContent-Length: 14\r\n\r\n".encode() + EMBED_BODY)
    assert full.startswith(b"HTTP/1.1 429 ")
    assert b"retry-after: " in full
    assert b"x-dure-ticket: " in full
    assert with_ticket.startswith(b"HTTP/1.1 100 Continue")
    for thread in threads:
        thread.join(10)


def test_an_overloaded_machine_reads_no_bodies(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (*server.graph.models.values(), *server.graph.services.values()):
        monkeypatch.setattr(each.gate, "overload", lambda: "memory is at 95%")
    head = "HTTP/1.1\r\nHost: dure\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: 9\r\n"
    kinds = {"/v1/vision/judge": "multipart/form-data; boundary=b", "/api/yh/jobs": "multipart/form-data; boundary=b"}
    for path in (EMBED, "/predict", "/v1/search", "/v1/models/shout/run", *kinds):
        kind = kinds.get(path, "application/json")
        refused = server.raw(f"POST {path} {head}Content-Type: {kind}\r\n\r\n".encode())
        assert refused.startswith(b"HTTP/1.1 503 "), path
        assert b"memory is at 95%" in refused
    assert server.ask("GET", "/health").status == 200


@pytest.mark.parametrize("where", ["before the body is read", "in the endpoint"])
def test_a_crash_is_a_plain_500_and_the_log_has_it_quoted(
    server: Running, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret")

    model = server.graph.models["shout"]
    if where == "in the endpoint":
        monkeypatch.setattr(model, "results", crash)
    else:
        monkeypatch.setattr(model.gate, "check_newcomer", crash)
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    path = "/v1/models/%73hout/run"
    answer = server.post(path, b'{"items": [1]}', JSON, f"Origin: {ORIGIN}", "X-Request-ID: the-crash")
    assert (answer.status, answer.error["type"]) == (500, "internal")
    assert "secret" not in json.dumps(answer.content)
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert answer.headers["x-request-id"] == "the-crash"
    assert {path in record.getMessage() for record in caplog.records if record.exc_info} == {True}


@pytest.mark.parametrize("can_deny", [True, False])
def test_a_websocket_is_refused_as_a_request_is(can_deny: bool) -> None:
    sent: list[Any] = []

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        raise DureError(401, "unauthorized", "send a key, " * 20)

    async def send(message: Any) -> None:
        sent.append(message)

    extensions = {"websocket.http.response": {}} if can_deny else {}
    scope = {"type": "websocket", "path": "/ws/a", "headers": [(b"x-request-id", b"1")], "extensions": extensions}
    asyncio.run(Refusals(refuse)({**scope, FOUND: None}, any_of(None), send))
    if can_deny:
        assert (sent[0]["type"], sent[0]["status"]) == ("websocket.http.response.start", 401)
        assert json.loads(sent[1]["body"])["error"]["type"] == "unauthorized"
    else:
        assert (sent[0]["type"], sent[0]["code"]) == ("websocket.close", 1008)
        assert len(sent[0]["reason"]) <= 123


def test_names_in_paths_forge_no_log_lines(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    caplog.set_level(logging.INFO, "ray.serve")
    for path in ("/v1/models/a%0aINFO%20forged/run", "/nowhere%0d%0aINFO%20forged"):
        server.post(path, b"[" * 200, JSON)
        server.post(path, b"{}", JSON)
    assert caplog.records
    assert not any("\n" in record.getMessage() or "\r" in record.getMessage() for record in caplog.records)


def test_requests_without_the_outermost_border_cross_one_in_the_app(server: Running) -> None:
    """As those do that come through Serve's own proxy."""

    async def ask(body: bytes, *headers: tuple[bytes, bytes], prefix: str = "") -> tuple[int, Any]:
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.get_running_loop().create_future()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": f"{prefix}//v1/embeddings",
            "root_path": prefix,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers],
        }
        await server.app(scope, receive, send)
        assert not any(name == b"x-request-id" for name, _ in sent[0]["headers"])  # the proxy has sent one
        return sent[0]["status"], json.loads(sent[1]["body"])

    assert server.do(lambda: ask(EMBED_BODY))[0] == 200
    assert server.do(lambda: ask(EMBED_BODY, prefix="/dure"))[0] == 200
    assert server.do(lambda: ask(b"[" * 200))[0] == 400
    assert server.do(lambda: ask(b" " * 26 * 2**20))[0] == 413
    assert server.do(lambda: ask(EMBED_BODY, (b"x-request-id", b"\xff")))[0] == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict", b'{"text": "a", "top_k": 2}'),
        ("/predict", b'{"text": "a", "top_k": 0}'),
        (EMBED, b'{"input": ["one", "two"], "dimensions": 2}'),
        (EMBED, b'{"input": {}}'),
        (EMBED, b'{"input": "x", "model": "nothing"}'),
        ("/v1/rerank", b'{"query": "a", "documents": ["b", "c"]}'),
        ("/v1/search", b'{"query": "a"}'),
        ("/v1/models/shout/run", b'{"items": [{"say": "x"}]}'),
        ("/v1/models/nothing/run", b'{"items": [1]}'),
        ("/v1/models/shout/reload", b"{}"),
        (EMBED, b'{"input": '),
        ("/predict", b'{"text": '),
    ],
)
def test_the_short_way_in_answers_as_fastapi_does(
    server: Running, path: str, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = server.post(path, body, JSON)
    monkeypatch.setattr(Found, "serves", lambda *_: False)
    fastapi = server.post(path, body, JSON)
    assert short.status == fastapi.status
    if body.endswith(b": "):  # the two parsers say it in other words
        assert all("the body is not JSON" in each.error["message"] for each in (short, fastapi))
    else:
        assert short.content == fastapi.content
    assert short.headers["content-type"] == fastapi.headers["content-type"]


@pytest.mark.parametrize("path", ["/v1/embeddings/", "/v1/embeddings//", "//v1//embeddings/"])
def test_a_slash_at_the_end_of_a_path_changes_nothing(server: Running, path: str) -> None:
    assert server.post(path, b'{"input": "a"}', JSON).status == 200


@pytest.mark.parametrize("path", ["/api/yh/jobs/", "/api/yh/jobs//"])
def test_deleting_a_job_without_its_id_deletes_none(server: Running, path: str) -> None:
    assert httpx.delete(f"{server.url}{path}?tenant_id=acme", timeout=10).status_code == 404


def test_of_a_path_that_is_not_there_a_slash_makes_none(server: Running) -> None:
    assert server.post("/v1/embedding/", b'{"input": "a"}', JSON).status == 404
    assert server.post("/v1/models/shout/run/", b'{"items": [1]}', JSON).content["results"] == [1]
