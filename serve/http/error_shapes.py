"""Errors in the shape that clients of each API expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import orjson
from fastapi import Response
from pydantic import ValidationError
from starlette.types import Scope

from serve import errors
from serve.errors import DureError

OPENAI_PATHS = ("/v1/embeddings", "/v1/models", "/v1/chat", "/v1/completions")
OLLAMA_PATHS = frozenset(
    f"/api/{name}" for name in ("chat", "generate", "embed", "embeddings", "show", "tags", "ps", "version")
)
LONGEST_PATH = 200


def response(path: str, error: DureError | ValidationError) -> Response:
    """The response for an error at the endpoint with this path."""
    if isinstance(error, ValidationError):
        error = of_validation(path, error.errors(include_url=False)[0])
    return Response(orjson.dumps(content(path, error)), error.status, error.headers, "application/json")


def content(path: str, error: DureError) -> dict[str, Any]:
    """The body that says what is wrong, for clients of the API that has this path."""
    if path in OLLAMA_PATHS:
        return {"error": error.message}
    said = errors.body(error.kind, error.message, error.param)
    if path.startswith(OPENAI_PATHS):
        said["error"] |= {"param": error.param, "code": error.code}
    return said


def of_validation(path: str, problem: Mapping[str, Any]) -> DureError:
    """A pydantic problem as a DureError. OpenAI's API answers 400 where FastAPI answers 422."""
    param = ".".join(str(part) for part in problem["loc"]) or None
    message = errors.problem_text(problem)
    if problem["type"] == "json_invalid":
        param, message = None, f"the body is not JSON: {problem['ctx']['error']}"
    status = 400 if path.startswith(OPENAI_PATHS) or path in OLLAMA_PATHS else 422
    return DureError(status, "invalid_request", f"{param}: {message}" if param else message, param)


def sent_path(scope: Scope) -> str:
    """A request's path as the client sent it, percent-encoded so that it is safe in messages and logs."""
    sent = scope.get("raw_path") or scope["path"].encode()
    return quote(sent[:LONGEST_PATH], safe="/%:@!$&'()*+,;=~")
