"""Next words while somebody types: a WebSocket on which only the newest input is answered."""

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
from serve.waiting import end

logger = logging.getLogger("ray.serve")

router = APIRouter(tags=["next word"])

SEND_S = 10.0
"""A client that does not read for this long is disconnected."""
CLOSE_S = 5.0
STOPPING = "the server is restarting; connect again"
LONGEST_REASON = 120
"""Characters of the close reason; a close frame holds little more. Dure's messages about headers are ASCII."""
REPLIES = 128
"""Errors and pongs that may wait to be sent. A client that leaves more unread is disconnected."""


class Input(PredictRequest):
    """The text typed so far."""

    type: Literal["input"]
    id: str | Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Returned with the answer."""
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
    """Answers each `{"type": "input", "text": ...}` unless a newer one supersedes it."""
    graph: Graph = socket.app.state.graph
    with contextlib.suppress(WebSocketDisconnect):  # clients may leave at any time
        if not _origin_allowed(socket, graph.settings.ingress.cors_origins):
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
    """Once the server is about to stop, tell all connected clients to reconnect."""
    await stopping.wait()
    for connection in list(CONNECTED):
        connection.stop()


def _origin_allowed(socket: WebSocket, origins: list[str]) -> bool:
    """Browsers don't apply CORS to WebSockets, so the server has to check which pages may connect."""
    origin = socket.headers.get("origin")
    if origin is None or "*" in origins or origin in origins:
        return True
    try:
        return urlsplit(origin).netloc == socket.headers.get("host")
    except ValueError:
        return False


class LimitExceeded(Exception):
    """Closes the connection because the client exceeded a limit."""


class Connection:
    """One loop reads and one sends, so sends never overlap. Replies never wait for the model."""

    def __init__(self, socket: WebSocket, graph: Graph, caller: Caller) -> None:
        self.socket = socket
        self.graph = graph
        self.caller = caller
        """The caller of the connection. Each input gets its full timeout."""
        self.newest: Input | None = None
        """The latest input, until its answer is begun."""
        self.answering: asyncio.Task[dict[str, Any]] | None = None
        """The task that answers the latest input taken from `newest`."""
        self.replies: deque[dict[str, Any]] = deque()
        self.changed = asyncio.Event()
        self.reading = asyncio.ensure_future(self._read())
        self.stopped = False

    def stop(self) -> None:
        """Close the connection because the server stops."""
        self.stopped = True
        self.reading.cancel()

    async def run(self) -> None:
        """Serve the connection until the client leaves or is disconnected, or the server stops."""
        loops = [self.reading, asyncio.ensure_future(self._send_all())]
        try:
            await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if self.answering:
                self.answering.cancel()
            await self._close([each for each in await end(*loops) if isinstance(each, Exception)])

    async def _close(self, ends: list[Exception]) -> None:
        code, reason = status.WS_1011_INTERNAL_ERROR, ""
        if self.stopped:
            code, reason = status.WS_1012_SERVICE_RESTART, STOPPING
        for error in ends:
            if isinstance(error, LimitExceeded | TimeoutError):
                code, reason = status.WS_1008_POLICY_VIOLATION, str(error) or "the client does not read its answers"
            elif not isinstance(error, WebSocketDisconnect):
                logger.error("a connection failed", exc_info=error)
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):  # it may be closed already
            async with asyncio.timeout(CLOSE_S):
                await self.socket.close(code, reason)

    async def _read(self) -> None:
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            self._handle(message.get("text"))
            if len(self.replies) > REPLIES:
                raise LimitExceeded("the client does not read its answers")

    def _handle(self, text: str | None) -> None:
        try:
            read = self._parsed(text)
        except ValidationError as error:
            self._reply({"type": "error", "message": _message(error)})
        except DureError as error:
            self._reply({"type": "error", "message": error.message})
        else:
            if isinstance(read, Ping):
                self._reply({"type": "pong"})
                return
            self.newest = read
            if self.answering:
                self.answering.cancel()
            self.changed.set()

    def _parsed(self, text: str | None) -> Input | Ping:
        if text is None:
            raise errors.invalid("send text, not bytes")
        check(text.encode(), JsonBounds.of(self.graph.settings.limits))
        return MESSAGES.validate_json(text)

    def _reply(self, reply: dict[str, Any]) -> None:
        self.replies.append(reply)
        self.changed.set()

    async def _send_all(self) -> None:
        while True:
            await self.changed.wait()
            self.changed.clear()
            while self.replies:
                await self._send(self.replies.popleft())
            if self.newest:
                newest, self.newest = self.newest, None
                self.answering = asyncio.ensure_future(self._answer(newest))
                self.answering.add_done_callback(lambda _: self.changed.set())
            elif self.answering and self.answering.done():
                answered, self.answering = self.answering, None
                if not answered.cancelled():
                    await self._send(answered.result())

    async def _answer(self, given: Input) -> dict[str, Any]:
        echoed = {} if given.id is None else {"id": given.id}
        try:
            caller = Caller.waiting(self.caller.timeout_s, self.caller.tenant, given.ticket)
            _, words = await next_words(given, self.graph, caller)
            return {"type": "prediction", "data": words, "input": given.text, **echoed}
        except DureError as error:
            later = {"retry_after": int(error.headers["Retry-After"])} if error.retry_after_s is not None else {}
            ticket = {"ticket": error.ticket} if error.ticket else {}
            return {"type": "error", "message": error.message, **later, **ticket, **echoed}
        except Exception:  # the client gets no traceback; the log does
            logger.exception("an input could not be answered")
            return {"type": "error", "message": errors.internal().message, **echoed}

    async def _send(self, message: dict[str, Any]) -> None:
        # Not wait_for: in Python 3.11 it swallows a cancellation that comes just as the text has been sent.
        async with asyncio.timeout(SEND_S):
            await self.socket.send_text(orjson.dumps(message).decode())


def _message(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in problem["loc"] if part not in ("input", "ping"))
    message = errors.problem_text(problem)
    return f"{param}: {message}" if param else message
