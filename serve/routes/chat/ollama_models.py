"""What Ollama's clients ask about models: which there are, which are loaded, and what they can do."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter

from serve.calls.graph import Graph
from serve.calls.model import Model
from serve.http.requests import Body, GraphDep

router = APIRouter(prefix="/api", tags=["chat"])

VERSION = "0.12.0"
"""Of Ollama's API, on which clients decide what they may ask."""
CAPABILITIES = {"chat": ["completion"], "embedding": ["embedding"]}
"""What models of these tasks can do at least. Others are not listed."""


class Named(Body):
    model: str | None = None
    name: str | None = None
    """What older clients call the model."""
    keep_alive: Any = None
    """Accepted: when models leave memory is up to the config."""

    def model_of(self, task: str, graph: Graph) -> Model:
        named = self.model or self.name
        return graph.model(task, named.removesuffix(":latest") if named else None)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": VERSION}


@router.get("/tags")
async def tags(graph: GraphDep) -> dict[str, Any]:
    """The models that can chat or embed."""
    return {"models": [_model(graph, name) for name in graph.models if _capabilities(graph, name)]}


@router.get("/ps")
async def ps(graph: GraphDep) -> dict[str, Any]:
    """Those of the models that are loaded."""
    loaded = [name for name in graph.models if _capabilities(graph, name) and graph.watch.state(name) == "ready"]
    forever = datetime(2318, 1, 1, tzinfo=UTC).isoformat()
    return {
        "models": [
            _model(graph, name) | {"expires_at": forever, "size_vram": _facts(graph, name).get("weights_bytes") or 0}
            for name in loaded
        ]
    }


@router.post("/show")
async def show(body: Named, graph: GraphDep) -> dict[str, Any]:
    """What a model can do and how long its texts may be."""
    name = (body.model or body.name or "").removesuffix(":latest")
    graph.named(name, "model")
    facts = _facts(graph, name)
    info: dict[str, Any] = {"general.architecture": "dure", "general.basename": name}
    if facts.get("max_tokens"):
        info["dure.context_length"] = facts["max_tokens"]
    return {
        "details": _details(facts),
        "model_info": info,
        "capabilities": _capabilities(graph, name),
        "modified_at": _since(graph),
    }


def _capabilities(graph: Graph, name: str) -> list[str]:
    return _facts(graph, name).get("capabilities") or CAPABILITIES.get(graph.models[name].task, [])


def _facts(graph: Graph, name: str) -> dict[str, Any]:
    return next((replica.facts for replica in graph.watch.of(name) if replica.facts), None) or {}


def _model(graph: Graph, name: str) -> dict[str, Any]:
    facts = _facts(graph, name)
    return {
        "name": f"{name}:latest",  # Open WebUI looks names up with their tag
        "model": f"{name}:latest",
        "modified_at": _since(graph),
        "size": facts.get("weights_bytes") or 0,
        "digest": facts.get("version") or "",
        "details": _details(facts),
        "capabilities": _capabilities(graph, name),
    }


def _details(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": "dure",
        "families": ["dure"],
        "parameter_size": "",
        "quantization_level": facts.get("precision") or "",
    }


def _since(graph: Graph) -> str:
    return graph.started.isoformat()
