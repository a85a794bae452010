"""HTTP client of a running Dure, for `dure status` and `dure predict`."""

from __future__ import annotations

import asyncio
import json
import re
from http import HTTPStatus
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from serve.config.addresses import MOST_PORT
from serve.failures import MachineError, one_line

MOST_BYTES = 16 * 2**20


class Entry(BaseModel):
    """A model in the list of GET /v1/models."""

    id: str
    task: str
    state: str


class Models(BaseModel):
    """GET /v1/models."""

    data: list[Entry]


class Replica(BaseModel):
    replica: str
    status: str


class Model(Entry):
    """GET /v1/models/NAME."""

    device: str | None
    precision: str | None
    fallback_reason: str | None
    memory_mb: float | None
    load_seconds: float | None
    replicas: list[Replica]


class Word(BaseModel):
    append: str
    confidence: float


class Words(BaseModel):
    """POST /predict."""

    predictions: list[Word]


class _Problem(BaseModel):
    message: str


class _Refusal(BaseModel):
    error: _Problem


Answer = TypeVar("Answer", bound=BaseModel)


def ask(answer: type[Answer], url: str, path: str, body: object = None, timeout_s: float = 10) -> Answer:
    """The answer of the Dure at `url` to a GET, or with a `body` to a POST, within `timeout_s` in all.

    Raises MachineError if nothing answers, if the request is refused, or if the answer is not Dure's.
    """
    url = url.rstrip("/")
    shown = re.sub(r"//[^/@]*@", "//", url)
    try:
        if (httpx.URL(url).port or 1) > MOST_PORT:
            raise ValueError(f"ports end at {MOST_PORT}")
        status, content = asyncio.run(_fetch(url + path, body, timeout_s))
    except TimeoutError as error:
        raise MachineError(f"{shown} has not answered within {timeout_s:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError) as error:  # SOCKS needs a package
        reason = one_line(str(error)) or type(error).__name__
        raise MachineError(
            f"{shown} does not answer ({reason}); is `dure serve` running? Set --url or DURE_URL to its address"
        ) from error
    try:
        if status != HTTPStatus.OK:
            raise MachineError(one_line(_Refusal.model_validate_json(content).error.message))
        return answer.model_validate_json(content)
    except ValidationError as error:
        raise MachineError(f"{shown}{path} answered {status}, but this is not an answer of Dure") from error


async def _fetch(url: str, body: object, timeout_s: float) -> tuple[int, bytes]:
    content = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} if content else {}
    method = "POST" if content else "GET"
    received = bytearray()
    async with (
        asyncio.timeout(timeout_s),
        httpx.AsyncClient(timeout=None) as client,
        client.stream(method, url, content=content, headers=headers) as response,
    ):
        async for part in response.aiter_bytes():
            received += part
            if len(received) > MOST_BYTES:
                raise ValueError(f"it sent more than {MOST_BYTES // 2**20} MB")
        return response.status_code, bytes(received)
