"""Upstreams: Dure itself in both dialects, and servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from deployments.conversation import ChatRequest, Sampling, TextPiece
from deployments.load_progress import LoadEvent, LoadProgress
from deployments.spec import Upstream
from deployments.upstream.api import Api, End, UpstreamError
from deployments.upstream.ollama import Ollama
from deployments.upstream.openai import OpenAI
from tests import ingress
from tests.dure import free_port

HELLO = ChatRequest([{"role": "user", "content": "Hello"}], sampling=Sampling(temperature=0), max_tokens=5)
TEXT = ChatRequest(prompt="Once", max_tokens=5)
CHUNK = b'data: {"choices": [{"delta": {"content": "One "}}]}\n\n'
LINE = b'{"message": {"content": "One "}, "done": false}\n'


@pytest.fixture(scope="module")
def server() -> Iterator[ingress.Running]:
    with ingress.running() as running:
        yield running


def api_of(kind: str, port: int, **more: Any) -> Api:
    upstream = Upstream(kind, f"http://127.0.0.1:{port}", "chat", **more)  # type: ignore[arg-type]
    return {"ollama": Ollama, "openai": OpenAI}[kind](upstream)


async def asked(api: Api, request: ChatRequest) -> tuple[str, End]:
    found = [each async for each in api.answer(request)]
    assert isinstance(found[-1], End)
    return "".join(piece.text for piece in found if isinstance(piece, TextPiece)), found[-1]


@pytest.mark.parametrize("kind", ["openai", "ollama"])
@pytest.mark.parametrize("request_", [HELLO, TEXT])
def test_dure_is_an_upstream_in_both_dialects(server: ingress.Running, kind: str, request_: ChatRequest) -> None:
    async def run() -> None:
        api = api_of(kind, server.port)
        await api.load(LoadProgress(lambda _: None))
        await api.probe()
        text, end = await asked(api, request_)
        assert text == "One word."
        assert (end.finish, end.prompt_tokens, end.tokens) == ("stop", 5, 2)

    asyncio.run(run())


def test_what_is_asked_reaches_the_upstream(server: ingress.Running) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Seoul"}}}
    sampling = Sampling(0.5, 0.9, 7, 0.1, 1.0, -1.0, 1.1, {5: -100.0}, 3, 2)
    request = ChatRequest(
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "rain"},
        ],
        tools=[tool], tool_choice="=weather", sampling=sampling, max_tokens=9, stops=("END",), ignore_eos=True,
    )  # fmt: skip
    asyncio.run(asked(api_of("openai", server.port), request))
    handle: Any = server.graph.models["chat"].handle
    found = handle.asked[-1]
    assert (found.sampling, found.max_tokens, found.stops, found.ignore_eos) == (sampling, 9, ("END",), True)
    assert (found.tools, found.tool_choice) == (request.tools, "=weather")
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Seoul"}
    plain = ChatRequest(HELLO.messages, schema='{"type": "object"}', sampling=Sampling(0.5, 0.9, 7, 0.1), stops=("a",))
    asyncio.run(asked(api_of("ollama", server.port), plain))
    found = handle.asked[-1]
    assert (found.sampling, found.schema, found.stops) == (plain.sampling, plain.schema, ("a",))


def test_what_ollama_can_not_do_is_refused_by_name(server: ingress.Running) -> None:
    for field, request in {
        "logprobs": ChatRequest(HELLO.messages, sampling=Sampling(top_logprobs=1)),
        "logit_bias": ChatRequest(HELLO.messages, sampling=Sampling(logit_bias={1: 1.0})),
        "ignore_eos": ChatRequest(HELLO.messages, ignore_eos=True),
        "tool_choice": ChatRequest(HELLO.messages, tools=[{"function": {"name": "a"}}], tool_choice="required"),
        "prompt": ChatRequest(prompt=[1, 2]),
    }.items():
        with pytest.raises(UpstreamError, match=field) as refused:
            asyncio.run(asked(api_of("ollama", server.port), request))
        assert (refused.value.refusal.kind, refused.value.refusal.field) == ("invalid", field)


def test_a_model_that_is_missing_is_named(server: ingress.Running) -> None:
    api = OpenAI(Upstream("openai", f"http://127.0.0.1:{server.port}", "nope"))
    with pytest.raises(UpstreamError, match="no model 'nope'"):
        asyncio.run(asked(api, HELLO))


def head(status: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", "Connection: close", *headers, "", ""]).encode()


OK = head("200 OK", "Content-Type: text/event-stream")
Act = Callable[[socket.socket], None]


@contextmanager
def misbehaving(act: Act) -> Iterator[int]:
    """A server that reads a request and then does as it likes."""
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as listening:
        listening.settimeout(30)

        def serve() -> None:
            with listening.accept()[0] as connection:
                connection.settimeout(10)
                connection.recv(2**20)
                act(connection)
                with contextlib.suppress(OSError):  # unread bytes would make the end a reset
                    connection.shutdown(socket.SHUT_WR)
                    connection.settimeout(0.5)
                    while connection.recv(2**20):
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield port
        thread.join(15)


def sends(*parts: bytes) -> Act:
    def act(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)

    return act


def hangs(*parts: bytes) -> Act:
    def act(connection: socket.socket) -> None:
        sends(*parts)(connection)
        while connection.recv(1000):  # until the client gives up
            pass

    return act


@pytest.mark.parametrize(
    ("act", "kind", "said"),
    [
        (sends(), "lost", "does not answer"),
        (sends(b"nonsense\r\n\r\n"), "lost", "does not answer"),
        (hangs(), "late", "has sent nothing for 1 s"),
        (hangs(OK, CHUNK), "late", "has sent nothing for 1 s"),
        (sends(OK, CHUNK), "lost", "in the middle"),
        (sends(OK, b"data: {garbage}\n\n"), "failed", "not the API"),
        (sends(OK, b"data: []\n\n"), "failed", "not the API"),
        (sends(OK, b"x" * 3_000_000), "failed", "not the API"),
        (sends(OK, CHUNK, b'data: {"error": {"message": "out of memory"}}\n\n'), "failed", "out of memory"),
        (sends(head("500 Oops"), b"<html>"), "failed", "status 500"),
        (sends(head("401 No")), "failed", "refuses a request without a key"),
        (sends(head("400 Bad"), b'{"error": {"message": "too long"}}'), "invalid", "too long"),
        (sends(head("503 Busy", "Retry-After: 7"), b'{"error": "loading"}'), "lost", "loading"),
        (sends(head("429 Busy", "Retry-After: 900")), "busy", "status 429"),
        (sends(head("302 Found", "Location: http://127.0.0.1:1/")), "failed", "status 302"),
    ],
)
def test_what_an_upstream_does_wrong_is_told_and_nothing_hangs(act: Act, kind: str, said: str) -> None:
    with misbehaving(act) as port:
        started = time.monotonic()
        with pytest.raises(UpstreamError, match=said) as refused:
            asyncio.run(asked(api_of("openai", port, timeout_s=1), HELLO))
        assert time.monotonic() - started < 10
    assert refused.value.refusal.kind == kind
    assert 1 <= refused.value.refusal.retry_after_s <= 120


def test_an_upstream_that_is_away_is_told() -> None:
    with pytest.raises(UpstreamError, match="does not answer"):
        asyncio.run(asked(api_of("ollama", free_port()), HELLO))


def test_what_ollama_pulls_is_this_models_progress() -> None:
    events: list[LoadEvent] = []
    port = free_port()
    layers = [{"status": "pulling", "total": 200, "completed": done} for done in (50, 100, 200)]
    answers = {
        b"/api/tags": json.dumps({"models": []}).encode(),
        b"/api/pull": b"".join(json.dumps(each).encode() + b"\n" for each in [*layers, {"status": "success"}]),
        b"/api/chat": json.dumps({"message": {"content": ""}, "done": True, "done_reason": "load"}).encode(),
    }

    async def run() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            path = (await reader.readline()).split()[1]
            writer.write(head("200 OK") + answers[path])
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", port):
            await api_of("ollama", port).load(LoadProgress(events.append))

    asyncio.run(run())
    assert [event.progress for event in events] == [40.0, 55.0, 85.0]
