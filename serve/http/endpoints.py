"""What is known about an endpoint before a request's body is read."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace

from fastapi import FastAPI, Response, params
from fastapi.routing import APIRoute
from starlette.types import Scope

from serve.config.settings import Limits
from serve.http.early import Calls
from serve.http.requests import SMALL_BYTES, Body

JSON, MULTIPART, URLENCODED = "application/json", "multipart/form-data", "application/x-www-form-urlencoded"
FOUND = "dure.found"
"""The scope key under which the border stores a request's `Found`."""
PREFIX_PARTS = 3
"""Most path segments in a `route_prefix`. Serve strips the prefix only after the border."""


@dataclass(frozen=True)
class Endpoint:
    path: str
    """As declared, with its parameters."""
    pattern: re.Pattern[str]
    methods: frozenset[str]
    media: tuple[str, ...] = ()
    """Content types that a body may have; empty if the endpoint decides itself."""
    max_bytes: int = SMALL_BYTES
    calls: Calls | None = None
    body: type[Body] | None = None
    run: Callable[..., Awaitable[Response]] | None = None
    """The handler, if it takes only a `body`, the graph, the caller and path parameters, as the fast path provides."""


@dataclass(frozen=True)
class Found:
    endpoint: Endpoint
    parts: dict[str, str] = field(default_factory=dict)
    """Path parameters."""
    prefix: str = ""
    """What preceded the endpoint's path in the request's path."""

    def serves(self, scope: Scope) -> bool:
        """Whether the prefix is the app's own. Only the app knows its prefix; the border's bounds apply under any."""
        return self.prefix == str(scope.get("root_path", ""))


class Endpoints:
    def __init__(self, app: FastAPI, limits: Limits) -> None:
        """Collects all endpoints declared in the app so far."""
        endpoints = [_endpoint(route, limits) for route in _routes(app)]
        self._fixed = {
            (method, each.path): Found(each) for each in endpoints if "{" not in each.path for method in each.methods
        }
        self._patterns = [each for each in endpoints if "{" in each.path]

    def find(self, scope: Scope) -> Found | None:
        """The endpoint for a request; None if there is none, and for WebSockets."""
        if scope["type"] != "http":
            return None
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        whole = path = scope["path"]
        for _ in range(1 + PREFIX_PARTS):
            if found := self._at(method, path):
                return found if path is whole else replace(found, prefix=whole.removesuffix(path))
            path = path[path.find("/", 1) :] if "/" in path[1:] else ""
        return None

    def _at(self, method: str, path: str) -> Found | None:
        if fixed := self._fixed.get((method, path)):
            return fixed
        for endpoint in self._patterns:
            if method in endpoint.methods and (match := endpoint.pattern.fullmatch(path)):
                return Found(endpoint, match.groupdict())
        return None


def _routes(app: FastAPI) -> Iterator[APIRoute]:
    """All routes, including those of included routers."""
    for route in app.routes:
        inner = getattr(getattr(route, "original_router", None), "routes", [route])
        yield from (each for each in inner if isinstance(each, APIRoute))


def _endpoint(route: APIRoute, limits: Limits) -> Endpoint:
    body, methods = _body(route), frozenset(route.methods or ())
    forms = [each.field_info for each in route.dependant.body_params if isinstance(each.field_info, params.Form)]
    media: tuple[str, ...] = ()
    max_bytes = SMALL_BYTES if methods <= {"GET", "HEAD", "DELETE"} else limits.max_body_bytes
    if body:
        media, max_bytes = (JSON,), min(body.max_bytes(limits), limits.max_body_bytes)
    elif any(isinstance(each, params.File) for each in forms):
        media = (MULTIPART,)
    elif forms:
        media, max_bytes = (MULTIPART, URLENCODED), SMALL_BYTES  # urlencoded fields are parsed one by one in Python
    fast = body is not None and _is_plain(route)
    calls: Calls | None = getattr(route.endpoint, "calls", None)
    return Endpoint(
        route.path,
        route.path_regex,
        methods,
        media,
        max_bytes,
        calls,
        body,
        route.endpoint if fast else None,
    )


def _body(route: APIRoute) -> type[Body] | None:
    """The pydantic model of the endpoint's JSON body; None if it takes no JSON."""
    for parameter in inspect.signature(route.endpoint, eval_str=True).parameters.values():
        kind = parameter.annotation
        if isinstance(kind, type) and issubclass(kind, Body):
            return kind
    return None


def _is_plain(route: APIRoute) -> bool:
    """Whether the handler needs only a body, the graph, the caller and path parameters."""
    return set(inspect.signature(route.endpoint).parameters) == {"body", "graph", "caller", *route.param_convertors}
