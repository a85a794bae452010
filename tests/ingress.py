"""The ingress without Ray: the real app and border, on Serve's HTTP server, with fake models that answer at once.

In between, Serve's request handling is imitated: it reads ahead of the app without limit and decodes its own headers.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from types import SimpleNamespace
from typing import Any

import numpy as np
from fastapi.routing import APIRoute
from ray.serve._private import http_util
from ray.serve._private.direct_ingress_http_util import ASGIDIReceiveProxy
from ray.serve.config import HTTPOptions
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.conversation import Delta, Reply, TextPiece
from deployments.load_progress import LoadEvent
from deployments.messages import Answer, Embeddings, ItemProgress, Piece, Requests, Scores, Word
from serve.board.reports import Replica
from serve.board.watch import Watch
from serve.caller import Caller
from serve.calls.deployment import Deployment
from serve.calls.graph import Graph
from serve.calls.model import Model
from serve.calls.next_words import Predictions
from serve.config.model import ModelSettings
from serve.config.settings import Settings
from serve.http.fast_path import DirectApp
from serve.http.requests import Body
from serve.http.server import ServerBounds, serve_behind
from serve.ingress import make_app, routers
from serve.progress import Following
from serve.queues.client import Lanes
from serve.services.adverts.verdicts import Font, Judgement, Validation
from tests.dure import free_port

MODELS = {
    "predictor": {"task": "next_word", "source": "x"},
    "embedder": {"task": "embedding", "source": "x", "max_queue": 4},
    "reranker": {"task": "rerank", "source": "x"},
    "vision": {"task": "vision", "source": "x"},
    "shout": {"task": "tests.engines:Shout", "source": "x"},
    "chat": {"task": "chat", "source": "x"},
}
WORDS = (TextPiece("One "), TextPiece("word."))
"""What the chat model answers."""


VALIDATION = Validation(
    analysis="a",
    is_valid=True,
    image_quality_ok=True,
    relevance_score=1,
    issues=[],
    recommendations=[],
    font_recommendation=Font(style="bold", size="large", color="dark"),
)
JUDGEMENT = Judgement(analysis="a", on_brief=True, occlusion=False, contrast_ok=True, cta_present=True, issues=[])


class Answering:
    """A handle whose replica answers every request while `may` is set."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.may = asyncio.Event()
        self.may.set()
        self.asked: list[Any] = []
        self.logits: list[float] | None = None
        """Logits of a cross-encoder. None: descending ones."""

    def options(self, stream: bool) -> Any:
        return SimpleNamespace(run=SimpleNamespace(remote=self._run))

    def _run(self, requests: Requests) -> Any:
        return AnsweringCall(self, requests)

    def results(self, items: list[Any]) -> Any:
        count = len(items)
        if self.task == "embedding":
            return Embeddings(np.eye(count, 4, dtype=np.float32), np.ones(count, np.int32))
        if self.task == "rerank":
            logits = np.asarray(self.logits or np.linspace(0.9, 0.1, count), np.float32)
            return Scores(logits, np.ones(count, np.int32))
        if self.task == "next_word":
            return [[Word("word", " word", 0.5)] for _ in items]
        if self.task == "vision":
            verdicts = [VALIDATION if "is_valid" in item.schema else JUDGEMENT for item in items]
            return [Answer(verdict.model_dump_json(), 1) for verdict in verdicts]
        if self.task == "chat":
            return [Reply(WORDS, "stop", 5, 0, 2) for _ in items]
        return items


class AnsweringCall:
    def __init__(self, handle: Answering, requests: Requests) -> None:
        self.handle = handle
        self.requests = requests

    async def __aiter__(self) -> AsyncIterator[Piece]:
        await self.handle.may.wait()
        items = self.requests.items
        self.handle.asked += items
        if self.handle.task == "chat" and self.requests.followed:
            delta = ItemProgress(tokens=1, delta=Delta(0, WORDS[:1]))
            yield Piece((), [], {}, dict.fromkeys(self.requests.followed, delta))
        yield Piece(self.requests.numbers, self.handle.results(items), {})

    def cancel(self) -> None:
        pass


class Ready(Watch):
    """A watch on which all models are loaded."""

    def __init__(self, models: list[str]) -> None:
        super().__init__()
        event = LoadEvent("ready", 100, "Ready", "준비됨")
        self.replicas = {(name, "1"): Replica(name, f"{name}#1", event, {"version": "1"}) for name in models}


class Open(Lanes):
    """Lanes in which there is always room."""

    @asynccontextmanager
    async def admitted(self, lane: str, caller: Caller, following: Following | None = None) -> AsyncIterator[None]:
        yield


def make_graph(models: dict[str, Any] | None = None, **settings: Any) -> Graph:
    """A graph with fake models. Needs a running event loop."""
    known = Settings.model_validate({"models": models or MODELS, "cache": {"ttl_s": 0}, **settings})
    watch = Ready(list(known.models))
    services = {name: Deployment(name, any_of(None), 4) for name in ("search", "adverts")}
    return Graph(
        ("ingress", "1"),
        known,
        watch,
        {name: _model(name, model, watch) for name, model in known.models.items()},
        services,
        Predictions(None),
        Open("me", dict.fromkeys(services, (1, 2)), {}),
        any_of(SimpleNamespace(guard=SimpleNamespace(reason=""))),
        False,
    )


def any_of(value: object) -> Any:
    return value


def _model(name: str, settings: ModelSettings, watch: Watch) -> Model:
    model = Model(name, settings, any_of(Answering(settings.task)), False, watch, 1, {})
    model.coalescer.start()
    return model


def as_serve_does(app: ASGIApp) -> ASGIApp:
    """Wrap the app as Serve's replica does, between its server and the app."""

    async def ingress(scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        for name, value in headers.items():
            name.decode()
            if name in (b"x-request-id", b"x-request-timeout-seconds", b"x-session-id", b"serve_multiplexed_model_id"):
                value.decode()
        assert http_util.parse_disconnect_disabled_header(headers) is False
        assert http_util.parse_request_timeout_header(headers, None) is None
        ahead = ASGIDIReceiveProxy(scope, receive, asyncio.get_running_loop())
        reading = ahead.fetch_until_disconnect_task()
        finished = False

        async def send_noted(message: Message) -> None:
            nonlocal finished
            await send(message)
            finished = message["type"] == "http.response.body" and not message.get("more_body", False)

        answering = asyncio.ensure_future(app(scope, ahead, send_noted))
        await asyncio.wait((reading, answering), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done() and not finished:
            answering.cancel()
            await asyncio.wait((answering,))
            raise asyncio.CancelledError
        reading.cancel()
        await answering

    return ingress


@dataclass(frozen=True)
class Heard:
    status: int
    headers: dict[str, str]
    """By lower-case name."""
    content: Any
    """Parsed JSON, else bytes."""

    @property
    def error(self) -> dict[str, Any]:
        found: Any = self.content["error"]
        return {"message": found} if isinstance(found, str) else found  # Ollama's errors are texts


@dataclass(frozen=True)
class Running:
    port: int
    loop: asyncio.AbstractEventLoop
    graph: Graph
    app: DirectApp

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def do(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Run a coroutine in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work(), self.loop).result(10)

    def raw(self, sent: bytes, seconds: float = 10) -> bytes:
        """Send bytes on a new connection and return all that comes back until it is closed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            connection.sendall(sent)
            received = b""
            while part := connection.recv(65536):
                received += part
            return received

    def post(self, path: str, body: bytes = b"", *headers: str) -> Heard:
        """POST with these headers, plus only those that HTTP needs."""
        return self.ask("POST", path, f"Content-Length: {len(body)}", *headers, body=body)

    def ask(self, method: str, path: str, *headers: str, body: bytes = b"") -> Heard:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_accept_encoding=True)
        for header in headers:
            name, _, value = header.partition(": ")
            connection.putheader(name, value.encode("latin-1"))
        connection.endheaders(body)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        told = {name.lower(): value for name, value in response.getheaders()}
        is_json = told.get("content-type") == "application/json" and content
        return Heard(response.status, told, json.loads(content) if is_json else content)


@contextmanager
def running(models: dict[str, Any] | None = None, **settings: Any) -> Iterator[Running]:
    """Run a server in a thread of its own."""
    port = free_port()
    started: list[Running] = []
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        graph = make_graph(models, **settings)
        app = make_app(graph)
        serve_behind(app.border.outermost, ServerBounds.of(graph.settings.limits, graph.settings.websocket))
        loop = asyncio.get_running_loop()
        options = HTTPOptions(host="127.0.0.1", port=port)
        task, server = await http_util.start_asgi_http_server(as_serve_does(app), options, event_loop=loop)
        while not server.started:
            await asyncio.wait((task,), timeout=0.01)
        started.append(Running(port, loop, graph, app))
        ready.set()
        await asyncio.to_thread(stop.wait)
        server.force_exit = server.should_exit = True
        await asyncio.wait((task,), timeout=5)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    try:
        assert ready.wait(30)
        yield started[0]
    finally:
        stop.set()
        thread.join(10)


@contextmanager
def held_back(server: Running, model: str) -> Iterator[None]:
    """Keep the model's replica from answering inside the block."""
    handle: Any = server.graph.models[model].handle

    async def may(answer: bool) -> None:
        if answer:
            handle.may.set()
        else:
            handle.may.clear()

    server.do(lambda: may(False))
    try:
        yield
    finally:
        server.do(lambda: may(True))


def json_endpoints() -> list[tuple[str, type[Body]]]:
    """Every endpoint that takes JSON, with its body class. A model name in the path is filled in."""
    routes = [
        route
        for router in routers(Settings.model_validate({"models": MODELS}))
        for route in router.routes
        if isinstance(route, APIRoute)
    ]
    return [
        (route.path.replace("{name}", "shout"), parameter.annotation)
        for route in routes
        for parameter in inspect.signature(route.endpoint, eval_str=True).parameters.values()
        if isinstance(parameter.annotation, type) and issubclass(parameter.annotation, Body)
    ]
