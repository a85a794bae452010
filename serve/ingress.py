"""The ingress deployment: a FastAPI app over the graph, with one error shape."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from serve import errors
from serve.caller import TICKET_HEADER
from serve.direct import DirectApp
from serve.errors import DureError
from serve.graph import Graph
from serve.middleware import BodyLimit, RequestCount
from serve.routes import (
    embeddings,
    events,
    health,
    jobs,
    metrics,
    models,
    predict,
    progress,
    queues,
    rerank,
    search,
    stages,
    vision,
    ws,
)
from serve.settings import Settings

ROUTERS = (
    health,
    models,
    progress,
    predict,
    embeddings,
    rerank,
    search,
    vision,
    jobs,
    stages,
    events,
    ws,
    queues,
    metrics,
)
OPENAI_PATHS = ("/v1/embeddings", "/v1/models")


def make_app(graph: Graph) -> FastAPI:
    """All routes over a graph. The outermost layer is the last one added."""
    app = DirectApp(title="Dure", description="Many models from few GPUs behind one endpoint.")
    max_bytes = int(graph.settings.limits.max_body_mb * 2**20)
    app.state.graph = graph
    for module in ROUTERS:
        app.include_router(module.router)
    app.add_exception_handler(DureError, _dure_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.go_direct(graph, max_bytes, _response)
    app.add_middleware(BodyLimit, max_bytes=max_bytes)
    if graph.settings.ingress.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=graph.settings.ingress.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "Retry-After", TICKET_HEADER],
        )
    app.add_middleware(RequestCount)
    return app


@serve.ingress()
class Ingress:
    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, models: dict[str, DeploymentHandle], services: dict[str, DeploymentHandle]
    ) -> None:
        self.graph = Graph.of(settings, models, services)
        self.graph.start()
        self.ending = asyncio.get_running_loop().create_task(ws.end_all(self.graph.watch.stopping))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self.graph)


def _response(path: str, error: DureError | ValidationError) -> JSONResponse:
    if isinstance(error, ValidationError):
        error = _invalid(path, error.errors(include_url=False)[0])
    content = errors.body(error.kind, error.message, error.param)
    if path.startswith(OPENAI_PATHS):
        content["error"] |= {"param": error.param, "code": None}
    return JSONResponse(content, error.status, error.headers)


def _invalid(path: str, problem: Mapping[str, Any]) -> DureError:
    """What pydantic found in Dure's shape; OpenAI's API says 400 where FastAPI says 422."""
    param = ".".join(str(part) for part in problem["loc"]) or None
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        param, message = None, f"the body is not JSON: {problem['ctx']['error']}"
    status = 400 if path.startswith(OPENAI_PATHS) else 422
    return DureError(status, "invalid_request", f"{param}: {message}" if param else message, param)


async def _dure_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, DureError)
    return _response(request.url.path, error)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's own findings in Dure's shape."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    return _response(request.url.path, _invalid(request.url.path, problem | {"loc": problem["loc"][1:]}))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    message = f"{request.method} {request.url.path}: {error.detail}; see GET /docs"
    response = _response(request.url.path, DureError(error.status_code, kind, message))
    response.headers.update(error.headers or {})
    return response
