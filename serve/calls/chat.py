"""Chat requests: admission to the model's lane, the answer's choices, and their text as it is written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace

from deployments.conversation import ChatRequest, Delta, Reply, TextPiece
from serve.caller import Caller
from serve.calls.graph import Graph
from serve.calls.model import Model
from serve.metrics import measured
from serve.progress import Following, Progress
from serve.waiting import end

MOST_CHOICES = 16


@dataclass(frozen=True)
class Written:
    """What was added to one of the choices."""

    choice: int
    pieces: list[TextPiece]


class Stream(Following):
    """Collects what is written of each choice."""

    def __init__(self, choices: int) -> None:
        super().__init__()
        self.pieces: list[list[TextPiece]] = [[] for _ in range(choices)]

    def wrote(self, place: int, delta: Delta) -> None:
        """Add the pieces that are new. After a gap nothing is added: the complete answer has what was lost."""
        have = self.pieces[place]
        new = delta.pieces[len(have) - delta.first :] if delta.first <= len(have) else ()
        if new:
            have += new
            self._changed.set()

    async def moved(self) -> None:
        """Returns at the next change of the progress, or of what is written."""
        await self._changed.wait()
        self._changed.clear()


async def replies(
    graph: Graph, model: Model, request: ChatRequest, choices: int, caller: Caller, following: Following | None = None
) -> list[Reply]:
    """The complete answers. Raises DureError."""
    with measured(model.name):
        async with graph.admitted(model, caller, following):
            owned = replace(request, tenant=caller.tenant)
            param = "messages" if request.messages is not None else "prompt"
            found: list[Reply] = await model.results(_choices(owned, choices), caller, param, following)
    return found


async def streamed(
    graph: Graph, model: Model, request: ChatRequest, choices: int, caller: Caller
) -> AsyncGenerator[Progress | Written | list[Reply]]:
    """What is written, as it is written, and how the request gets on before that; at last the complete answers.

    Raises DureError.
    """
    stream = Stream(choices)
    async for each in _watched(lambda: replies(graph, model, request, choices, caller, stream), stream):
        yield each


async def _watched(
    work: Callable[[], Awaitable[list[Reply]]], stream: Stream
) -> AsyncGenerator[Progress | Written | list[Reply]]:
    working, moved = asyncio.ensure_future(work()), asyncio.ensure_future(stream.moved())
    given = [0] * len(stream.pieces)
    known: Progress | None = None
    try:
        while True:
            await asyncio.wait((working, moved), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                answers = working.result()
                for choice, reply in enumerate(answers):
                    if rest := list(reply.pieces[given[choice] :]):
                        yield Written(choice, rest)
                yield answers
                return
            moved = asyncio.ensure_future(stream.moved())
            if stream.progress != known and stream.progress is not None:
                known = stream.progress
                yield known
            for choice, pieces in enumerate(stream.pieces):
                if new := pieces[given[choice] :]:
                    given[choice] = len(pieces)
                    yield Written(choice, new)
    finally:
        await end(working, moved)


def _choices(request: ChatRequest, count: int) -> list[ChatRequest]:
    """One request per choice. With a seed, each has its own."""
    seed = request.sampling.seed
    if seed is None or count == 1:
        return [request] * count
    return [replace(request, sampling=replace(request.sampling, seed=seed + choice)) for choice in range(count)]
