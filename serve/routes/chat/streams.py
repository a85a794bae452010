"""Answers as streams of server-sent events, in the chunks of OpenAI's APIs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any, Protocol

from fastapi.responses import StreamingResponse

from deployments.conversation import ChatRequest, Reply, TextPiece, TokenLogprob
from serve import errors
from serve.caller import Caller
from serve.calls.chat import Written, streamed
from serve.calls.graph import Graph
from serve.calls.model import Model
from serve.errors import DureError
from serve.http import sse
from serve.http.error_shapes import content
from serve.progress import Progress
from serve.routes.chat.shapes import entry, tool_call, usage

logger = logging.getLogger("ray.serve")

HEARTBEAT = b": x\n"
"""A comment without the empty line after it, which some decoders would take for an event."""


class Chunks(Protocol):
    """Makes the chunks of one answer."""

    def written(self, written: Written) -> Iterator[dict[str, Any]]: ...

    def ended(self, found: list[Reply]) -> Iterator[dict[str, Any]]: ...


async def response(
    graph: Graph, model: Model, request: ChatRequest, choices: int, caller: Caller, chunks: Chunks
) -> StreamingResponse:
    """The stream of an answer. Raises DureError for what is refused before anything is written."""
    updates = streamed(graph, model, request, choices, caller)
    first = await first_of(updates)
    return sse.response(_events(first, updates, caller, chunks))


async def first_of(updates: AsyncGenerator[Any]) -> list[Any]:
    """What comes up to the first text, but no more than a heartbeat's time: until then an error has its own status."""
    seen: list[Any] = []
    upcoming = asyncio.ensure_future(anext(updates))
    try:
        async with asyncio.timeout(sse.HEARTBEAT_S):
            while True:
                seen.append(await asyncio.shield(upcoming))
                if not isinstance(seen[-1], Progress):
                    return seen
                upcoming = asyncio.ensure_future(anext(updates))
    except TimeoutError:
        return [*seen, upcoming]
    except BaseException:
        upcoming.cancel()
        with contextlib.suppress(BaseException):
            await upcoming
        await updates.aclose()
        raise


async def resumed(first: list[Any], updates: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
    """All updates, those of `first_of` first."""
    try:
        for each in first:
            yield await each if isinstance(each, asyncio.Future) else each
        async for each in updates:
            yield each
    finally:
        if first and isinstance(first[-1], asyncio.Future) and not first[-1].done():
            first[-1].cancel()
            with contextlib.suppress(asyncio.CancelledError, DureError):
                await first[-1]
        await updates.aclose()


async def _events(
    first: list[Any], updates: AsyncGenerator[Any], caller: Caller, chunks: Chunks
) -> AsyncIterator[bytes]:
    everything = resumed(first, updates)
    async with contextlib.aclosing(everything), contextlib.aclosing(sse.with_pauses(everything)) as paced:
        try:
            async for update in paced:
                if update is None:
                    yield HEARTBEAT
                elif isinstance(update, Progress):
                    if caller.sees_events:
                        yield sse.event(update.fields(), update.state)
                elif isinstance(update, Written):
                    yield b"".join(map(sse.event, chunks.written(update)))
                else:
                    yield b"".join(map(sse.event, chunks.ended(update))) + b"data: [DONE]\n\n"
                    return
        except DureError as error:
            yield sse.event(content("/v1/chat/completions", error))
        except Exception:  # the client gets no traceback; the log does
            logger.exception("a streamed answer failed")
            yield sse.event(content("/v1/chat/completions", errors.internal()))


class _Choices:
    """What chunks of both APIs have in common."""

    def __init__(self, head: dict[str, Any], choices: int, with_usage: bool, with_logprobs: bool) -> None:
        self.head = head
        self.choices = choices
        self.with_usage = with_usage
        self.with_logprobs = with_logprobs

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self.head, "choices": choices, **more}

    def usage(self, found: list[Reply]) -> Iterator[dict[str, Any]]:
        if self.with_usage:
            yield self.chunk([], usage=usage(found))


class ChatChunks(_Choices):
    """Chunks of the chat API: the role first, and the reason for the end in a chunk of its own."""

    def __init__(self, head: dict[str, Any], choices: int, with_usage: bool, with_logprobs: bool) -> None:
        super().__init__(head, choices, with_usage, with_logprobs)
        self.calls = [0] * choices
        self.begun: set[int] = set()

    def written(self, written: Written) -> Iterator[dict[str, Any]]:
        yield from self._begin(written.choice)
        text = ""
        logprobs: tuple[TokenLogprob, ...] = ()
        for piece in written.pieces:
            if piece.call:
                if text:
                    yield self._delta(written.choice, {"content": text}, logprobs)
                yield self._delta(written.choice, {"tool_calls": [self._call(written.choice, piece)]}, piece.logprobs)
                text, logprobs = "", ()
            else:
                text, logprobs = text + piece.text, (*logprobs, *piece.logprobs)
        if text or logprobs:
            yield self._delta(written.choice, {"content": text}, logprobs)

    def ended(self, found: list[Reply]) -> Iterator[dict[str, Any]]:
        for choice, reply in enumerate(found):
            yield from self._begin(choice)
            end = {"index": choice, "delta": {}, "logprobs": None, "finish_reason": reply.finish}
            yield self.chunk([end])
        yield from self.usage(found)

    def _begin(self, choice: int) -> Iterator[dict[str, Any]]:
        if choice not in self.begun:
            self.begun.add(choice)
            yield self._delta(choice, {"role": "assistant", "content": ""}, ())

    def _call(self, choice: int, piece: TextPiece) -> dict[str, Any]:
        assert piece.call
        number = self.calls[choice]
        self.calls[choice] += 1
        return {"index": number, **tool_call(piece.call)}

    def _delta(self, choice: int, delta: dict[str, Any], logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        reported = {"content": [entry(each) for each in logprobs], "refusal": None}
        shown = reported if self.with_logprobs and logprobs else None
        return self.chunk([{"index": choice, "delta": delta, "logprobs": shown, "finish_reason": None}])


class TextChunks(_Choices):
    """Chunks of the completions API."""

    def written(self, written: Written) -> Iterator[dict[str, Any]]:
        text = "".join(piece.text for piece in written.pieces)
        tokens = [each for piece in written.pieces for each in piece.logprobs]
        logprobs = {
            "tokens": [each.token for each in tokens],
            "token_logprobs": [each.logprob for each in tokens],
            "top_logprobs": [{text: logprob for text, logprob, _ in each.top} for each in tokens],
        }
        if text or tokens:
            shown = logprobs if self.with_logprobs else None
            yield self.chunk([{"index": written.choice, "text": text, "logprobs": shown, "finish_reason": None}])

    def ended(self, found: list[Reply]) -> Iterator[dict[str, Any]]:
        for choice, reply in enumerate(found):
            yield self.chunk([{"index": choice, "text": "", "logprobs": None, "finish_reason": reply.finish}])
        yield from self.usage(found)
