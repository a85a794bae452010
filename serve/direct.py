"""A short way in for plain JSON endpoints.

Of the time that the ingress spent on small requests, 54 % were below FastAPI's entry and 14 % in the endpoint (py-spy,
samples that held the interpreter lock, 64 clients): the rest were middleware, routing and dependencies. An endpoint
that takes a JSON body, the graph and the caller needs none of that. It is declared as any other, so the
documentation has it and its way through FastAPI stays open; requests that are out of the ordinary (another content
type, a browser of another origin, a body over the limit) take that.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from fastapi import FastAPI, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serve import errors
from serve.caller import Caller
from serve.errors import DureError
from serve.graph import Graph
from serve.metrics import REQUESTS
from serve.middleware import CLIENT_LEFT, read_body
from serve.routes.common import Body

logger = logging.getLogger("ray.serve")

Respond = Callable[[str, DureError | ValidationError], Response]
"""An error as a response of an endpoint with that path."""


@dataclass(frozen=True)
class Direct:
    """An endpoint `run(body=..., graph=..., caller=..., **parts of the path)`."""

    path: str
    pattern: re.Pattern[str]
    body: type[Body]
    run: Callable[..., Awaitable[Response]]


class DirectApp(FastAPI):
    def go_direct(self, graph: Graph, max_bytes: int, respond: Respond) -> None:
        """Open the short way for all endpoints declared so far that can take it."""
        self._graph, self._max_bytes, self._respond = graph, max_bytes, respond
        self._direct = [direct for route in _routes(self) if (direct := _direct(route))]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and self._is_ordinary(scope):
            for direct in self._direct:
                if match := direct.pattern.fullmatch(scope["path"]):
                    await self._serve(direct, match.groupdict(), scope, receive, send)
                    return
        await super().__call__(scope, receive, send)

    def _is_ordinary(self, scope: Scope) -> bool:
        """A body of JSON within the limit, and no other origin to be told whether it may read the answer."""
        is_json = False
        for name, value in scope["headers"]:
            if name == b"origin":
                return False
            if name == b"content-length" and value.isdigit() and int(value) > self._max_bytes:
                return False
            if name == b"content-type":
                is_json = value.startswith(b"application/json")
        return is_json

    async def _serve(self, direct: Direct, parts: dict[str, str], scope: Scope, receive: Receive, send: Send) -> None:
        status = CLIENT_LEFT
        try:
            response = await self._answer(direct, parts, scope, receive)
            await response(scope, receive, send)
            status = response.status_code
        except ClientDisconnect:
            return
        finally:
            REQUESTS.labels("POST", direct.path, str(status)).inc()

    async def _answer(self, direct: Direct, parts: dict[str, str], scope: Scope, receive: Receive) -> Response:
        path = scope["path"]
        try:
            caller = Caller.of(scope["headers"], self._graph.settings.request_timeout_s)
            body = _parsed(direct.body, await read_body(receive, self._max_bytes))
            return await direct.run(body=body, graph=self._graph, caller=caller, **parts)
        except (DureError, ValidationError) as error:
            return self._respond(path, error)
        except (ClientDisconnect, asyncio.CancelledError):
            raise
        except Exception:  # the client gets no traceback; the log does
            logger.exception("POST %s failed", path)
            return self._respond(path, errors.internal())


def _routes(app: FastAPI) -> Iterator[APIRoute]:
    """All routes, those of included routers too."""
    for route in app.routes:
        inner = getattr(getattr(route, "original_router", None), "routes", [route])
        yield from (each for each in inner if isinstance(each, APIRoute))


def _direct(route: APIRoute) -> Direct | None:
    """The short way to a route; None where it needs more than parts of the path, a body, the graph and the caller."""
    parameters = inspect.signature(route.endpoint, eval_str=True).parameters
    body = parameters["body"].annotation if "body" in parameters else None
    if not (isinstance(body, type) and issubclass(body, Body)):
        return None
    if set(parameters) != {"body", "graph", "caller", *route.param_convertors}:
        return None
    return Direct(route.path, route.path_regex, body, route.endpoint)


def _parsed(body: type[Body], content: bytes) -> Body:
    """Raises ValidationError. What pydantic takes for no JSON (half a surrogate pair) json may, and name the field."""
    try:
        return body.model_validate_json(content)
    except ValidationError as error:
        if error.errors(include_url=False)[0]["type"] != "json_invalid":
            raise
        try:
            loaded = json.loads(content)
        except ValueError:
            raise error from None
        return body.model_validate(loaded)
