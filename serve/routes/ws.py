"""Next words while somebody types: one connection, of whose inputs only the newest is answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import orjson
from fastapi import APIRouter, Path, WebSocket, WebSocketDisconnect, status
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from serve import errors
from serve.errors import DureError
from serve.graph import Graph
from serve.metrics import CONNECTIONS
from serve.routes.common import Body
from serve.routes.predict import PredictRequest, next_words

logger = logging.getLogger("ray.serve")

router = APIRouter(tags=["next word"])

SEND_S = 10.0
"""A client that takes nothing for so long is disconnected."""
REPLIES = 16
"""Errors and pongs that may wait to be sent; nothing more is read from a client that leaves them lying."""


class Input(PredictRequest):
    """What has been typed so far."""

    type: Literal["input"]
    id: str | int | None = None
    """Comes back with the answer."""


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
    if not _welcome(socket, graph.settings.ingress.cors_origins):
        await socket.close(status.WS_1008_POLICY_VIOLATION, "this origin is not among the config's cors_origins")
        return
    await socket.accept()
    if len(CONNECTED) >= graph.settings.websocket.max_connections:
        await socket.close(status.WS_1013_TRY_AGAIN_LATER, "too many connections; come back in a minute")
        return
    connection = Connection(socket, graph)
    CONNECTED.add(connection)
    try:
        await connection.run()
    finally:
        CONNECTED.discard(connection)


def _welcome(socket: WebSocket, origins: list[str]) -> bool:
    """Browsers ask nobody before they connect, so the pages that may are the server's to tell."""
    origin = socket.headers.get("origin")
    own = urlsplit(origin).netloc == socket.headers.get("host") if origin else True
    return own or "*" in origins or origin in origins


class Connection:
    """Two loops: one reads, one answers. All that is sent is sent by the second, so nothing is sent twice at once."""

    def __init__(self, socket: WebSocket, graph: Graph) -> None:
        self.socket = socket
        self.graph = graph
        self.newest: Input | None = None
        """Read and not yet taken up."""
        self.answering: asyncio.Task[tuple[str, orjson.Fragment]] | None = None
        self.replies: asyncio.Queue[dict[str, Any]] = asyncio.Queue(REPLIES)
        self.news = asyncio.Event()

    async def run(self) -> None:
        """Until the client leaves."""
        loops = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._answer())]
        try:
            await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for loop in loops:
                loop.cancel()
            if self.answering:
                self.answering.cancel()
            for ended in await asyncio.gather(*loops, return_exceptions=True):
                if isinstance(ended, Exception) and not isinstance(ended, WebSocketDisconnect | TimeoutError):
                    logger.error("a connection failed", exc_info=ended)
            with contextlib.suppress(RuntimeError):  # it is closed already
                await self.socket.close(status.WS_1011_INTERNAL_ERROR)

    async def _read(self) -> None:
        rate = self.graph.settings.websocket.max_messages_per_s
        allowed, since = rate, time.monotonic()
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            await self._take(message.get("text"))
            # A second's worth of messages may come at once.
            now = time.monotonic()
            allowed, since = min(rate, allowed + (now - since) * rate) - 1, now
            if allowed < 0:
                await asyncio.sleep(-allowed / rate)

    async def _take(self, text: str | None) -> None:
        try:
            if text is None:
                raise errors.invalid("send text, not bytes")
            read = MESSAGES.validate_json(text)
        except ValidationError as error:
            await self._reply({"type": "error", "message": _told(error)})
        except DureError as error:
            await self._reply({"type": "error", "message": error.message})
        else:
            if isinstance(read, Ping):
                await self._reply({"type": "pong"})
                return
            self.newest = read
            if self.answering:
                self.answering.cancel()
            self.news.set()

    async def _reply(self, reply: dict[str, Any]) -> None:
        await self.replies.put(reply)
        self.news.set()

    async def _answer(self) -> None:
        while True:
            await self.news.wait()
            self.news.clear()
            while not self.replies.empty():
                await self._send(self.replies.get_nowait())
            if self.newest:
                asked, self.newest = self.newest, None
                answer = await self._answer_to(asked)
                if answer is not None and self.newest is None:
                    await self._send(answer)

    async def _answer_to(self, asked: Input) -> dict[str, Any] | None:
        """None where a newer input has overtaken this one."""
        told = {} if asked.id is None else {"id": asked.id}
        try:
            self.answering = asyncio.ensure_future(next_words(asked, self.graph))
            _, words = await self.answering
            return {"type": "prediction", "data": words, "input": asked.text, **told}
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task and task.cancelling():  # it is the connection that ends
                raise
            return None
        except DureError as error:
            return {"type": "error", "message": error.message, **told}
        except Exception:  # the client gets no traceback; the log does
            logger.exception("an input could not be answered")
            return {"type": "error", "message": errors.internal().message, **told}
        finally:
            self.answering = None

    async def _send(self, message: dict[str, Any]) -> None:
        await asyncio.wait_for(self.socket.send_text(orjson.dumps(message).decode()), SEND_S)


def _told(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in problem["loc"] if part not in ("input", "ping"))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{param}: {message}" if param else message
