"""What both kinds of upstream have in common: the connection, its errors, and lines of a stream."""

from __future__ import annotations

import contextlib
import json
import os
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

from deployments.conversation import ChatRequest, Reply, TextPiece
from deployments.load_progress import LoadProgress
from deployments.messages import Refusal
from deployments.spec import Upstream

CONNECT_S = 5.0
LONGEST_LINE = 2**20
"""Bytes of one line of a stream, or of an error."""
PROBE_S = 10.0
"""Timeout of requests that ask how the upstream is."""


class UpstreamError(Exception):
    """The upstream can't answer, for the reason that the refusal gives."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


@dataclass(frozen=True)
class End:
    """What an upstream says when an answer has ended."""

    finish: str = "stop"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0


class Api:
    """An upstream's API."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        key = os.environ.get(upstream.key_env, "") if upstream.key_env else ""
        self.client = httpx.AsyncClient(
            base_url=upstream.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(upstream.timeout_s, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=upstream.max_concurrent),
        )

    @abstractmethod
    async def load(self, progress: LoadProgress) -> None:
        """Have the upstream load the model, with its progress. Raises UpstreamError."""

    @abstractmethod
    async def probe(self) -> None:
        """Ask the upstream for a sign of life, at no cost to it. Raises UpstreamError."""

    @abstractmethod
    def answer(self, request: ChatRequest) -> AsyncGenerator[TextPiece | End]:
        """The answer's pieces as they come, then its end. Raises UpstreamError."""

    async def get(self, path: str) -> Any:
        """The JSON at this path. Raises UpstreamError."""
        with self._errors():
            response = await self.client.get(path, timeout=PROBE_S)
            if not response.is_success:
                raise UpstreamError(self.refused(response.status_code, response.content, response.headers))
            try:
                return response.json()
            except ValueError as error:
                raise self.garbage() from error

    async def lines(self, path: str, body: dict[str, Any]) -> AsyncIterator[str]:
        """The lines of the answer to a POST, without empty ones. Raises UpstreamError."""
        with self._errors():
            async with self.client.stream("POST", path, json=body) as response:
                if not response.is_success:
                    content = b""
                    async for part in response.aiter_bytes():
                        content += part
                        if len(content) > LONGEST_LINE:
                            break
                    raise UpstreamError(self.refused(response.status_code, content, response.headers))
                held = b""
                async for part in response.aiter_bytes():
                    *whole, held = (held + part).split(b"\n")
                    if len(held) > LONGEST_LINE:
                        raise self.garbage()
                    for line in whole:
                        if text := line.decode(errors="replace").strip():
                            yield text
                if text := held.decode(errors="replace").strip():
                    yield text

    @contextlib.contextmanager
    def _errors(self) -> Any:
        """What httpx raises, as UpstreamErrors."""
        where = self.upstream.url
        try:
            yield
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            said = f"{where} has sent nothing for {self.upstream.timeout_s:g} s"
            raise UpstreamError(Refusal(said, "late")) from error
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError) as error:
            said = f"{where} does not answer, or broke off ({type(error).__name__}); send the request again"
            raise UpstreamError(Refusal(said, "lost", retry_after_s=2)) from error

    def garbage(self) -> UpstreamError:
        return UpstreamError(
            Refusal(f"{self.upstream.url} answers with something that is not the API of {self.upstream.kind}", "failed")
        )

    def parsed(self, line: str) -> dict[str, Any]:
        """The object that a line holds. Raises UpstreamError if it holds none, or an error."""
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self.garbage() from error
        if not isinstance(found, dict):
            raise self.garbage()
        if problem := found.get("error"):
            raise UpstreamError(Refusal(f"{self.upstream.url}: {_message(problem)}", "failed"))
        return found

    def refused(self, status: int, content: bytes, headers: Any) -> Refusal:
        """The refusal for a request that the upstream has answered with this status."""
        try:
            said = _message(json.loads(content).get("error"))
        except (ValueError, AttributeError, RecursionError):
            said = f"status {status}"
        said = f"{self.upstream.url}: {said}"
        if status == 429:
            return Refusal(said, "busy", retry_after_s=_seconds(headers.get("Retry-After")))
        if status in (400, 413, 422):
            return Refusal(said, "invalid")
        if status in (502, 503):
            return Refusal(said, "lost", retry_after_s=_seconds(headers.get("Retry-After")))
        if status in (408, 504):
            return Refusal(said, "late")
        if status in (401, 403):
            named = f"the key in ${self.upstream.key_env}" if self.upstream.key_env else "a request without a key"
            return Refusal(f"{self.upstream.url} refuses {named}", "failed")
        return Refusal(said, "failed")


def _message(problem: Any) -> str:
    """What an error says: Ollama's is a text, OpenAI's an object."""
    said = problem.get("message") if isinstance(problem, dict) else problem
    return str(said)[:500] if said else "an error without words"


def _seconds(given: str | None) -> float:
    """Seconds of a Retry-After header, 1 to 120."""
    try:
        return min(120.0, max(1.0, float(given or 1)))
    except ValueError:
        return 1.0


def reply(pieces: list[TextPiece], end: End) -> Reply:
    """The complete answer."""
    called = any(piece.call for piece in pieces)
    finish = "tool_calls" if called else "length" if end.finish == "length" else "stop"
    return Reply(
        tuple(pieces),
        finish,  # type: ignore[arg-type]
        end.prompt_tokens,
        end.cached_tokens,
        end.tokens,
        0,
        end.prompt_seconds,
        end.seconds,
    )
