"""Which models there are and how they are, and a door to models of kinds that Dure has no endpoint for."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import Field

from serve import errors
from serve.graph import Graph
from serve.metrics import measured
from serve.routes.common import Body, GraphDep, answer
from serve.settings import TASKS

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(graph: GraphDep) -> dict[str, Any]:
    """OpenAI's list, with each model's task and state."""
    return {"object": "list", "data": [_entry(graph, name) for name in graph.models]}


@router.get("/v1/models/{name}")
async def get_model(name: str, graph: GraphDep) -> dict[str, Any]:
    """How a model was loaded and how its replicas are."""
    if name not in graph.models:
        raise errors.not_found(f"no model {name!r}; there are {', '.join(graph.models)}", "name")
    replicas = graph.watch.of(name)
    facts = next((replica.facts for replica in replicas if replica.facts), None) or {}
    weights = facts.get("weights_bytes")
    return _entry(graph, name) | {
        "device": facts.get("device"),
        "precision": facts.get("precision"),
        "quantized": facts.get("quantized"),
        "memory_mb": None if weights is None else round(weights / 2**20, 1),
        "fallback_reason": facts.get("fallback_reason"),
        "load_seconds": facts.get("load_seconds"),
        "quality": None,
        "replicas": [
            {
                "replica": replica.replica,
                "status": replica.event.status,
                "progress": replica.event.progress,
                "message": replica.event.message,
                **{key: (replica.facts or {}).get(key) for key in ("device", "precision", "load_seconds")},
            }
            for replica in replicas
        ],
    }


class RunRequest(Body):
    items: Annotated[list[Any], Field(min_length=1)]


@router.post("/v1/models/{name}/run")
async def run(name: str, body: RunRequest, graph: GraphDep) -> Response:
    """Run a model of your own engine (`task: MODULE:CLASS`): each item goes to its `prepare` as it is."""
    if name not in graph.models:
        raise errors.not_found(f"no model {name!r}; there are {', '.join(graph.models)}", "name")
    model = graph.models[name]
    if model.task in TASKS:
        raise errors.invalid(f"model {name!r} has task {model.task}, which has an endpoint of its own; see GET /docs")
    if len(body.items) > graph.settings.limits.max_list_items:
        raise errors.invalid(f"items has more than {graph.settings.limits.max_list_items} entries", "items")
    with measured(name):
        results = await model.results(body.items, graph.settings.request_timeout_s, "items")
    return answer({"model": name, "results": results})


def _entry(graph: Graph, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "dure",
        "task": graph.models[name].task,
        "state": graph.watch.state(name),
    }
