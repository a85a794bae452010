"""A fast path for plain JSON endpoints that bypasses FastAPI.

On small requests the ingress spent 54 % of its time below FastAPI's entry point, and only 14 % in the endpoint (py-spy,
samples holding the interpreter lock, 64 clients). The rest of the 54 % was middleware, routing and dependencies. An
endpoint that takes only a JSON body, the graph and the caller needs none of these. It is declared like any other
endpoint, so it appears in the documentation and still works through FastAPI.
"""

from __future__ import annotations

import asyncio
import json
import logging

from fastapi import FastAPI, Response
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from serve import errors
from serve.caller import Caller
from serve.calls.graph import Graph
from serve.errors import DureError
from serve.http.border import Border
from serve.http.endpoints import FOUND, Endpoints, Found
from serve.http.error_shapes import response, sent_path
from serve.http.heads import headers_only
from serve.http.json_values import unwritable
from serve.http.requests import Body

logger = logging.getLogger("ray.serve")

NAMED_BYTES = 2**20
"""Longer bodies are not parsed again to locate a surrogate: it would delay others, and pydantic names the column."""


class DirectApp(FastAPI):
    def go_direct(self, graph: Graph) -> None:
        """Open the fast path, behind a border of its own, for all suitable endpoints declared so far."""
        self._graph = graph
        self.border = Border.of(graph, Endpoints(self, graph.settings.limits))
        self._bordered = self.border.around(self._take)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or FOUND in scope:
            await self._take(scope, receive, send)
        else:
            await self._bordered(scope, receive, send)

    async def _take(self, scope: Scope, receive: Receive, send: Send) -> None:
        found: Found | None = scope.get(FOUND)
        if scope["type"] == "http" and scope["method"] == "HEAD":
            await headers_only(super().__call__, scope, send)
        elif found and found.endpoint.run and found.serves(scope):
            answer = await self._answer(found, scope, receive)
            await answer(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def _answer(self, found: Found, scope: Scope, receive: Receive) -> Response:
        endpoint = found.endpoint
        assert endpoint.body
        assert endpoint.run
        try:
            caller = Caller.of(scope["headers"], self._graph.settings.request_timeout_s)
            body = _parsed(endpoint.body, await Request(scope, receive).body())
            return await endpoint.run(body=body, graph=self._graph, caller=caller, **found.parts)
        except (DureError, ValidationError) as error:
            return response(endpoint.path, error)
        except (ClientDisconnect, asyncio.CancelledError):
            raise
        except Exception:  # the client gets no traceback; the log does
            logger.exception("POST %s failed", sent_path(scope))
            return response(endpoint.path, errors.internal())


def _parsed(body: type[Body], content: bytes) -> Body:
    """Raises ValidationError, or a DureError that locates half a surrogate pair, which pydantic reports as bad JSON."""
    try:
        return body.model_validate_json(content)
    except ValidationError as error:
        if error.errors(include_url=False)[0]["type"] != "json_invalid" or len(content) > NAMED_BYTES:
            raise
        try:
            found = unwritable(json.loads(content))
        except ValueError:
            raise error from None
        if found is None:
            raise
        where, why = found
        raise errors.invalid(f"{where or 'the body'} {why}", where or None) from error
