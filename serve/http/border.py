"""What every request crosses before Ray Serve or the app sees it, and every response crosses on its way back.

A short chain of small ASGI apps, each wrapping the next. They work from a request's head, for HTTP and WebSockets
alike. They know endpoints only by their declarations, so new endpoints are covered without extra code.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from fastapi import Response
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import errors
from serve.caller import TICKET_HEADER, Caller
from serve.calls.graph import Graph
from serve.errors import DureError
from serve.http import error_shapes
from serve.http.bodies import Bodies, Budget
from serve.http.early import refuse_early
from serve.http.endpoints import FOUND, Endpoints, Found
from serve.http.headers import REQUEST_ID, Tidy, tidy
from serve.http.sockets import Messages
from serve.metrics import REQUESTS

logger = logging.getLogger("ray.serve")

CLIENT_LEFT = 499
LOAD = (429, 503)
"""Statuses of refusals under load. There may be many, so they are counted in metrics but not logged."""
DENIAL = "websocket.http.response"
LONGEST_REASON = 120
"""Bytes of the close reason; a WebSocket close frame holds little more."""


@dataclass(frozen=True)
class Border:
    graph: Graph
    endpoints: Endpoints
    budget: Budget

    @classmethod
    def of(cls, graph: Graph, endpoints: Endpoints) -> Border:
        limits = graph.settings.limits
        return cls(graph, endpoints, Budget(max(limits.max_bodies_bytes, limits.max_body_bytes)))

    def outermost(self, app: ASGIApp) -> ASGIApp:
        """Wraps Serve's own app, where nothing has read the request yet."""
        return Tidy(self._with_endpoint(self._chain(app)))

    def around(self, app: ASGIApp) -> ASGIApp:
        """Wraps the app itself, for requests through Serve's proxy, which adds request ids to responses."""

        async def tidied(scope: Scope, receive: Receive, send: Send) -> None:
            tidy(scope)
            await bordered(scope, receive, send)

        bordered = self._with_endpoint(self._chain(app))
        return tidied

    def _with_endpoint(self, app: ASGIApp) -> ASGIApp:
        """Stores the request's endpoint in its scope. A slash at the end of the path is dropped if none has it.

        Not of a DELETE: `/jobs/ID` of which the id is missing must not become `/jobs`.
        """

        async def marked(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "lifespan":
                scope[FOUND] = self.endpoints.find(scope)
                if scope[FOUND] is None and scope["path"].endswith("/") and scope.get("method") != "DELETE":
                    scope["path"] = scope["path"].rstrip("/") or "/"
                    scope[FOUND] = self.endpoints.find(scope)
            await app(scope, receive, send)

        return marked

    def _chain(self, app: ASGIApp) -> ASGIApp:
        """Wraps from the inside out."""
        settings = self.graph.settings
        app = Bodies(app, settings.limits, self.budget)
        app = Messages(app, settings.limits, settings.websocket)
        app = Early(app, self.graph)
        app = Refusals(app)
        if settings.ingress.cors_origins:
            app = CORSMiddleware(
                app,
                allow_origins=settings.ingress.cors_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["X-Request-ID", "Retry-After", TICKET_HEADER],
            )
        return Count(app)


class Count:
    """Counts responses by method, route and status."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = CLIENT_LEFT

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        finally:
            found: Found | None = scope[FOUND]
            route = found.endpoint if found and found.serves(scope) else scope.get("route")
            REQUESTS.labels(scope["method"], getattr(route, "path", "unknown"), str(status)).inc()


class Refusals:
    """Turns exceptions raised further in into responses: a DureError as it is, anything else as a plain 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        except ClientDisconnect:
            return
        except Exception as failure:
            error = failure if isinstance(failure, DureError) else errors.internal()
            self._log(scope, error, failure)
            if started:
                raise
            await _refuse(scope, receive, send, error)

    def _log(self, scope: Scope, error: DureError, failure: Exception) -> None:
        if error.status in LOAD:
            return
        method, path = scope.get("method", "WebSocket"), error_shapes.sent_path(scope)
        request_id = next(value.decode() for name, value in scope["headers"] if name == REQUEST_ID)
        crash = None if failure is error else failure
        level, extra = logging.ERROR if crash else logging.INFO, {"request_id": request_id}
        logger.log(level, "%s %s %d %s", method, path, error.status, error.kind, exc_info=crash, extra=extra)


async def _refuse(scope: Scope, receive: Receive, send: Send, error: DureError) -> None:
    found: Found | None = scope[FOUND]
    response: Response = error_shapes.response(found.endpoint.path if found else scope["path"], error)
    if error.status == 408:  # a slow sender must not keep the connection
        response.headers["connection"] = "close"
    if scope["type"] == "http" or DENIAL in scope.get("extensions", {}):
        await response(scope, receive, send)
    else:
        reason = error.message.encode("ascii", "replace")[:LONGEST_REASON].decode()
        await send({"type": "websocket.close", "code": 1008, "reason": reason})


class Early:
    """Refuses requests that would be refused whatever their body says."""

    def __init__(self, app: ASGIApp, graph: Graph) -> None:
        self.app = app
        self.graph = graph

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found: Found | None = scope.get(FOUND)
        if found and found.endpoint.calls:
            caller = Caller.of(scope["headers"], self.graph.settings.request_timeout_s)
            refuse_early(self.graph, found.endpoint.calls, found.parts, caller)
        await self.app(scope, receive, send)
