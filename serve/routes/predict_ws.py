"""Next words while somebody types: one connection, of whose inputs only the newest is answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import orjson
from fastapi import APIRouter, Path, WebSocket, WebSocketDisconnect, status
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from serve import errors
from serve.caller import Caller
from serve.calls.graph import Graph
from serve.errors import DureError
from serve.http.json_bounds import JsonBounds, check
from serve.http.requests import Body
from serve.metrics import CONNECTIONS
from serve.routes.predict import PredictRequest, next_words

logger = logging.getLogger("ray.serve")

router = APIRouter(tags=["next word"])

SEND_S = 10.0
"""A client that takes nothing for so long is disconnected."""
CLOSE_S = 5.0
STOPPING = "the server is restarted; connect again"
LONGEST_REASON = 120
"""A close frame has room for so many bytes of it; what Dure says of headers is ASCII."""
REPLIES = 128
"""Errors and pongs that may wait to be sent; a client that leaves more lying is disconnected."""


class Input(PredictRequest):
    """What has been typed so far."""

    type: Literal["input"]
    id: str | Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Comes back with the answer."""
    ticket: str | None = None
    """From an earlier refusal."""


class Ping(Body):
    model_config = ConfigDict(extra="ignore")
    type: Literal["ping"]


CONNECTED: set[Connection] = set()
CONNECTIONS.set_function(lambda: len(CONNECTED))

MESSAGES: TypeAdapter[Input | Ping] = TypeAdapter(Annotated[Input | Ping, Field(discriminator="type")])


@router.websocket("/ws/{client_id}")
async def type_along(socket: WebSocket, client_id: Annotated[str, Path(max_length=128)]) -> None:
    """Answers each `{"type": "input", "text": ...}` that no newer one has overtaken."""
    graph: Graph = socket.app.state.graph
    with contextlib.suppress(WebSocketDisconnect):  # clients may leave at any moment
        if not _welcome(socket, graph.settings.ingress.cors_origins):
            await socket.close(status.WS_1008_POLICY_VIOLATION, "this origin is not among the config's cors_origins")
            return
        await socket.accept()
        try:
            caller = Caller.of(socket.scope["headers"], graph.settings.request_timeout_s)
        except DureError as error:
            await socket.close(status.WS_1008_POLICY_VIOLATION, error.message[:LONGEST_REASON])
            return
        if graph.watch.stopping.is_set():
            await socket.close(status.WS_1012_SERVICE_RESTART, STOPPING)
            return
        if len(CONNECTED) >= graph.settings.websocket.max_connections:
            await socket.close(status.WS_1013_TRY_AGAIN_LATER, "too many connections; come back in a minute")
            return
        connection = Connection(socket, graph, caller)
        CONNECTED.add(connection)
        try:
            await connection.run()
        finally:
            CONNECTED.discard(connection)


async def end_all(stopping: asyncio.Event) -> None:
    """Once the server is about to stop, tell all who are connected to come back."""
    await stopping.wait()
    for connection in list(CONNECTED):
        connection.stop()


def _welcome(socket: WebSocket, origins: list[str]) -> bool:
    """Browsers ask nobody before they connect, so the pages that may are the server's to tell."""
    origin = socket.headers.get("origin")
    if origin is None or "*" in origins or origin in origins:
        return True
    try:
        return urlsplit(origin).netloc == socket.headers.get("host")
    except ValueError:
        return False


class NotKept(Exception):
    """The connection is closed because the client goes beyond what one may."""


class Connection:
    """Two loops: one reads, one sends, so nothing is sent twice at once. What is sent never waits for the model."""

    def __init__(self, socket: WebSocket, graph: Graph, caller: Caller) -> None:
        self.socket = socket
        self.graph = graph
        self.caller = caller
        """As of the connection: each input has as much time."""
        self.newest: Input | None = None
        """Read and not yet taken up."""
        self.answering: asyncio.Task[dict[str, Any]] | None = None
        """The answer to the newest input that was taken up."""
        self.replies: deque[dict[str, Any]] = deque()
        self.news = asyncio.Event()
        self.reading = asyncio.ensure_future(self._read())
        self.stopped = False

    def stop(self) -> None:
        """End it, as the server stops."""
        self.stopped = True
        self.reading.cancel()

    async def run(self) -> None:
        """Until the client leaves or is sent away, or the server stops."""
        loops = [self.reading, asyncio.ensure_future(self._send_all())]
        try:
            await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*loops, self.answering):
                if task:
                    task.cancel()
            ends = await asyncio.gather(*loops, return_exceptions=True)
            await self._close([end for end in ends if isinstance(end, Exception)])

    async def _close(self, ends: list[Exception]) -> None:
        code, reason = status.WS_1011_INTERNAL_ERROR, ""
        if self.stopped:
            code, reason = status.WS_1012_SERVICE_RESTART, STOPPING
        for end in ends:
            if isinstance(end, NotKept | TimeoutError):
                code, reason = status.WS_1008_POLICY_VIOLATION, str(end) or "answers are not taken"
            elif not isinstance(end, WebSocketDisconnect):
                logger.error("a connection failed", exc_info=end)
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):  # it may be closed already
            async with asyncio.timeout(CLOSE_S):
                await self.socket.close(code, reason)

    async def _read(self) -> None:
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            self._take(message.get("text"))
            if len(self.replies) > REPLIES:
                raise NotKept("answers are not taken")

    def _take(self, text: str | None) -> None:
        try:
            read = self._parsed(text)
        except ValidationError as error:
            self._reply({"type": "error", "message": _told(error)})
        except DureError as error:
            self._reply({"type": "error", "message": error.message})
        else:
            if isinstance(read, Ping):
                self._reply({"type": "pong"})
                return
            self.newest = read
            if self.answering:
                self.answering.cancel()
            self.news.set()

    def _parsed(self, text: str | None) -> Input | Ping:
        if text is None:
            raise errors.invalid("send text, not bytes")
        check(text.encode(), JsonBounds.of(self.graph.settings.limits))
        return MESSAGES.validate_json(text)

    def _reply(self, reply: dict[str, Any]) -> None:
        self.replies.append(reply)
        self.news.set()

    async def _send_all(self) -> None:
        while True:
            await self.news.wait()
            self.news.clear()
            while self.replies:
                await self._send(self.replies.popleft())
            if self.newest:
                asked, self.newest = self.newest, None
                self.answering = asyncio.ensure_future(self._answer(asked))
                self.answering.add_done_callback(lambda _: self.news.set())
            elif self.answering and self.answering.done():
                answered, self.answering = self.answering, None
                if not answered.cancelled():
                    await self._send(answered.result())

    async def _answer(self, asked: Input) -> dict[str, Any]:
        told = {} if asked.id is None else {"id": asked.id}
        try:
            caller = Caller.waiting(self.caller.timeout_s, self.caller.tenant, asked.ticket)
            _, words = await next_words(asked, self.graph, caller)
            return {"type": "prediction", "data": words, "input": asked.text, **told}
        except DureError as error:
            later = {"retry_after": int(error.headers["Retry-After"])} if error.retry_after_s is not None else {}
            ticket = {"ticket": error.ticket} if error.ticket else {}
            return {"type": "error", "message": error.message, **later, **ticket, **told}
        except Exception:  # the client gets no traceback; the log does
            logger.exception("an input could not be answered")
            return {"type": "error", "message": errors.internal().message, **told}

    async def _send(self, message: dict[str, Any]) -> None:
        # Not wait_for, which in Python 3.11 forgets that it was cancelled where the text has just been sent.
        async with asyncio.timeout(SEND_S):
            await self.socket.send_text(orjson.dumps(message).decode())


def _told(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in problem["loc"] if part not in ("input", "ping"))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{param}: {message}" if param else message
