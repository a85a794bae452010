"""Typing over a WebSocket to a model whose queue is full."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI

from serve.board.watch import Watch
from serve.caller import Caller
from serve.config.settings import Limits, Settings
from serve.queues.tickets import Refused
from serve.routes import predict_ws


class Predictions:
    """Refuses who comes without a ticket."""

    def __init__(self) -> None:
        self.tickets: list[str | None] = []

    async def of(self, model: Any, prompt: Any, caller: Caller) -> bytes:
        self.tickets.append(caller.ticket)
        if caller.ticket is None:
            raise Refused(128, 3, "my-ticket").error("predictor")
        return b"[]"


def test_who_is_refused_is_told_of_the_ticket_and_may_bring_it() -> None:
    predictions = Predictions()
    app = FastAPI()
    app.include_router(predict_ws.router)
    app.state.graph = SimpleNamespace(
        settings=Settings.model_construct(limits=Limits(), request_timeout_s=5),
        watch=Watch(),
        predictions=predictions,
        model=lambda *_: SimpleNamespace(name="predictor"),
    )

    async def scenario() -> None:
        said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        heard: asyncio.Queue[Any] = asyncio.Queue()

        async def ask(**message: Any) -> Any:
            said.put_nowait({"type": "websocket.receive", "text": json.dumps({"type": "input", **message})})
            return json.loads((await heard.get())["text"])

        scope = {"type": "websocket", "path": "/ws/somebody", "query_string": b"", "headers": []}
        connected = asyncio.create_task(app(scope, said.get, heard.put))
        said.put_nowait({"type": "websocket.connect"})
        assert (await heard.get())["type"] == "websocket.accept"
        refused = await ask(text="a", id=1)
        assert (refused["type"], refused["id"], refused["retry_after"]) == ("error", 1, 3)
        assert await ask(text="a", ticket=refused["ticket"]) == {"type": "prediction", "data": [], "input": "a"}
        said.put_nowait({"type": "websocket.disconnect", "code": 1000})
        await connected

    asyncio.run(asyncio.wait_for(scenario(), 5))
    assert predictions.tickets == [None, "my-ticket"]
