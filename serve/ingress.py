"""The ingress deployment: a FastAPI app over the graph, with one shape for all errors."""

from __future__ import annotations

import asyncio
import gc
import importlib
from http import HTTPStatus

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException

from serve import errors
from serve.calls.graph import Graph
from serve.config.services import SERVICES
from serve.config.settings import Settings
from serve.errors import DureError
from serve.http.error_shapes import of_validation, response, sent_path
from serve.http.fast_path import DirectApp
from serve.http.server import ServerBounds, serve_behind
from serve.routes import embeddings, health, loading, metrics, models, predict, predict_ws, queues, rerank
from serve.routes.adverts import vision
from serve.routes.chat import ollama, ollama_models, openai

ROUTES = (
    health,
    models,
    loading,
    predict,
    embeddings,
    rerank,
    vision,
    openai,
    ollama,
    ollama_models,
    predict_ws,
    queues,
    metrics,
)
"""Route modules that belong to no service."""


def routers(settings: Settings) -> list[APIRouter]:
    """Routers of all endpoints, including those of services."""
    entries = (*SERVICES.values(), *(own.entry for own in settings.services.values()))
    modules = [importlib.import_module(path) for entry in entries for path in entry.routes]
    return [module.router for module in (*ROUTES, *modules)]


def make_app(graph: Graph) -> DirectApp:
    """The app with all routes, calling the models and services of `graph`."""
    app = DirectApp(
        title="Dure",
        description="Many models from few GPUs behind one endpoint.",
        redirect_slashes=False,  # the border serves such paths; few clients send a body again to where they are sent
    )
    app.state.graph = graph
    for router in routers(graph.settings):
        app.include_router(router)
    app.add_exception_handler(DureError, _dure_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _crash)
    app.go_direct(graph)
    return app


@serve.ingress()
class Ingress:
    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, models: dict[str, DeploymentHandle], services: dict[str, DeploymentHandle]
    ) -> None:
        self.graph = Graph.of(settings, models, services)
        self.graph.start()
        self.ending = asyncio.get_running_loop().create_task(predict_ws.end_all(self.graph.watch.stopping))
        self.built = make_app(self.graph)
        serve_behind(self.built.border.outermost, ServerBounds.of(settings.limits, settings.websocket))
        gc.collect()
        gc.freeze()  # objects made so far are permanent; rescanning them took 4/5 of the time to parse long lists

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.built

    def check_health(self) -> None:
        """Raises RuntimeError if this replica would take requests and never answer them. Serve then replaces it."""
        if dead := self.graph.dead:
            raise RuntimeError(f"{' and '.join(dead)} has ended")


async def _dure_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DureError)
    return response(get_route_path(request.scope), error)


async def _validation_error(request: Request, error: Exception) -> Response:
    """FastAPI's validation errors in Dure's error shape."""
    assert isinstance(error, RequestValidationError)
    path, problem = get_route_path(request.scope), error.errors()[0]
    return response(path, of_validation(path, problem | {"loc": problem["loc"][1:]}))


async def _crash(request: Request, error: Exception) -> Response:
    """Answer with a 500. Starlette then raises the error again, and the border logs it."""
    return response(get_route_path(request.scope), errors.internal())


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    message = f"{request.method} {sent_path(request.scope)}: {error.detail}; see GET /docs"
    answer = response(get_route_path(request.scope), DureError(error.status_code, kind, message))
    answer.headers.update(error.headers or {})
    if answer.headers.get("allow") == "GET":
        answer.headers["allow"] = "GET, HEAD"
    return answer
