"""Health of Dure and its models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from serve.board.watch import Watch
from serve.http.requests import GraphDep

router = APIRouter(tags=["health"])


@router.get("/health/live")
async def live() -> dict[str, str]:
    """200 as soon as the ingress runs."""
    return {"status": "alive"}


@router.get("/health")
async def health(graph: GraphDep) -> JSONResponse:
    """200 if all models are ready or asleep and no service is in trouble; otherwise 503 with what is missing."""
    models = {name: _model(graph.watch, name) for name in graph.models}
    missing = [name for name, model in models.items() if model["state"] not in ("ready", "asleep")]
    troubles = {name: trouble for name in graph.services if (trouble := graph.watch.trouble(name))}
    if not missing and not troubles:
        return JSONResponse({"status": "healthy", "model_loaded": True, "models": models})
    failed = troubles or any(models[name]["state"] == "failed" for name in missing)
    found: dict[str, Any] = {
        "status": "failed" if failed else "loading",
        "model_loaded": not missing,
        "missing": [*missing, *troubles],
        "models": models,
    }
    if troubles:
        found["services"] = {name: {"state": "failed", "reason": trouble} for name, trouble in troubles.items()}
    return JSONResponse(found, 503, {"Retry-After": "5"})


def _model(watch: Watch, name: str) -> dict[str, Any]:
    state = watch.state(name)
    replicas = watch.of(name)
    found: dict[str, Any] = {
        "state": state,
        "replicas": sum(replica.event.status == "ready" for replica in replicas),
        "progress": watch.progress(name),
    }
    return found | ({"reason": watch.reason(name)} if state == "failed" else {})
