"""The models and their states, reloads, and an endpoint for models with engines of your own."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field, model_validator
from ray.exceptions import RayTaskError

from deployments.spec import Precision
from serve import errors
from serve.board.actor import board
from serve.calls.graph import Graph
from serve.config.model import ModelSettings
from serve.config.settings import Limits
from serve.config.tasks import TASKS
from serve.errors import DureError
from serve.http.early import calls
from serve.http.json_values import check_json
from serve.http.requests import Body, CallerDep, GraphDep
from serve.http.respond import respond
from serve.metrics import measured
from serve.progress import Following

router = APIRouter(tags=["models"])

POLL_S = 0.2
BOARD_S = 10.0
RELOAD_BYTES = 4096


@router.get("/v1/models")
async def list_models(graph: GraphDep) -> dict[str, Any]:
    """OpenAI's list, with each model's task and state."""
    return {"object": "list", "data": [_entry(graph, name) for name in graph.models]}


@router.get("/v1/models/{name}")
async def get_model(name: str, graph: GraphDep) -> dict[str, Any]:
    """How a model was loaded, and the state of its replicas."""
    graph.named(name)
    replicas = graph.watch.of(name)
    facts = next((replica.facts for replica in replicas if replica.facts), None) or {}
    weights = facts.get("weights_bytes")
    return _entry(graph, name) | {
        "source": facts.get("source"),
        "device": facts.get("device"),
        "precision": facts.get("precision"),
        "runtime": facts.get("runtime"),
        "quantized": facts.get("quantized"),
        "batches": facts.get("batches"),
        "memory_mb": None if weights is None else round(weights / 2**20, 1),
        "fallback_reason": facts.get("fallback_reason"),
        "load_seconds": facts.get("load_seconds"),
        "quality": facts.get("quality"),
        "replicas": [
            {
                "replica": replica.replica,
                "status": replica.event.status,
                "progress": replica.event.progress,
                "message": replica.event.message,
                **{key: (replica.facts or {}).get(key) for key in ("device", "precision", "load_seconds")},
                "gpu": asdict(replica.gpu) if replica.gpu else None,
            }
            for replica in replicas
        ],
    }


class ReloadRequest(Body):
    model_config = ConfigDict(extra="forbid")

    optimized: bool | None = None
    """True: as configured; false: the original, in torch and fp32."""
    precision: Precision | None = None
    source: Annotated[str, Field(min_length=1)] | None = None
    revision: str | None = None
    wait: bool = True
    """If false, answers 202 at once; the progress stream and GET /v1/models/NAME show how the reload goes."""

    @classmethod
    def max_bytes(cls, limits: Limits) -> int:
        return RELOAD_BYTES

    @model_validator(mode="after")
    def _one_way(self) -> ReloadRequest:
        if self.optimized is not None and self.precision is not None:
            raise ValueError("give `optimized` or `precision`, not both")
        if self.optimized is None and self.precision is None and self.source is None:
            raise ValueError("give `optimized`, `precision` or `source`")
        if self.revision is not None and self.source is None:
            raise ValueError("`revision` goes with `source`")
        return self

    def changes(self, configured: ModelSettings) -> dict[str, Any]:
        """The fields of the model's spec that differ from the config."""
        changed: dict[str, Any] = {}
        if self.precision or self.optimized:
            changed |= {"precision": self.precision or configured.precision, "runtime": configured.runtime}
        elif self.optimized is False:
            changed |= {"precision": "fp32", "runtime": "torch"}
        if self.source:
            changed |= {"source": self.source, "revision": self.revision}
        return changed


@router.post("/v1/models/{name}/reload")
async def reload(name: str, body: ReloadRequest, graph: GraphDep, caller: CallerDep) -> JSONResponse:
    """Load a model again in another precision or from another source, replica by replica, while it keeps serving.

    If loading fails, the old model stays and the answer says why. A reload lasts until the next deploy.
    """
    graph.named(name)
    actor = await asyncio.to_thread(board)
    try:
        order = await _board_answer(actor.order.remote(name, body.changes(graph.settings.models[name])))
    except ValueError as error:
        raise DureError(409, "conflict", str(error)) from error
    while body.wait and time.monotonic() < caller.deadline:
        await asyncio.sleep(POLL_S)
        latest, change = await _board_answer(actor.reload.remote(name))
        if latest is None or latest.order.number != order.number or latest.state == "failed":
            reason = latest.reason if latest else "it was deployed again meanwhile"
            await graph.watch.reached(change, BOARD_S)
            raise errors.invalid(f"{name} could not be reloaded and keeps serving as before: {reason}")
        if latest.state == "done":
            await graph.watch.reached(change, BOARD_S)
            return JSONResponse(await get_model(name, graph))
    return JSONResponse(await get_model(name, graph), 202)


async def _board_answer(answer: Any) -> Any:
    """The board's answer. Raises ValueError if the board refused."""
    try:
        return await asyncio.wait_for(answer, BOARD_S)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, ValueError) else error from error


class RunRequest(Body):
    items: Annotated[list[Any], Field(min_length=1)]

    @classmethod
    def max_bytes(cls, limits: Limits) -> int:
        return limits.max_body_bytes


@router.post("/v1/models/{name}/run")
@calls(model="name")
async def run(name: str, body: RunRequest, graph: GraphDep, caller: CallerDep) -> Response:
    """Run a model with an engine of your own (`task: MODULE:CLASS`). Its `prepare` gets each item unchanged."""
    model = graph.named(name)
    if model.task in TASKS:
        raise errors.invalid(f"model {name!r} has task {model.task}, which has an endpoint of its own; see GET /docs")
    if len(body.items) > graph.settings.limits.max_list_items:
        raise errors.invalid(f"items has more than {graph.settings.limits.max_list_items} entries", "items")
    check_json(body.items, "items")

    async def work(following: Following | None) -> dict[str, Any]:
        with measured(name):
            results = await model.results(body.items, caller, "items", following)
        return {"model": name, "results": results}

    return await respond(caller, work)


def _entry(graph: Graph, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "dure",
        "task": graph.models[name].task,
        "state": graph.watch.state(name),
    }
