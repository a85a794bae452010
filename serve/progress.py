"""How far a request is, for whoever wants to know while they wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

PAUSE_S = 0.1
"""Between two things that are told of a request."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    state: Literal["queued", "running"]
    place: int | None = None
    """In the queue, from 1."""
    estimated_wait_s: float | None = None
    doing: str | None = None
    """What is being done to the items, embedding or ranking, or to the model: loading."""
    loaded: float | None = None
    """Of the model, in percent."""
    done: int | None = None
    """Items, of `items`."""
    items: int | None = None
    tokens: int | None = None
    """Written so far."""

    def told(self) -> dict[str, Any]:
        """What is known of it, but for the state."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "state"}


class Following:
    """Filled by those who work on a request and read by one who follows it."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        """None before anything is known."""
        self._changed = asyncio.Event()

    def tell(self, progress: Progress) -> None:
        if progress != self.progress:
            self.progress = progress
            self._changed.set()

    def queued(self, place: int, estimated_wait_s: float) -> None:
        self.tell(Progress("queued", place, round(estimated_wait_s, 2)))

    def running(self, **known: Any) -> None:
        self.tell(Progress("running", **known))

    def at(self, doing: str) -> Following:
        """For one of several things that are done to a request: what is told there is told here, and what it is."""
        return Step(self, doing)

    async def changed(self) -> Progress:
        """What there is to tell, once that is something new."""
        await self._changed.wait()
        self._changed.clear()
        assert self.progress is not None
        return self.progress


class Step(Following):
    def __init__(self, whole: Following, doing: str) -> None:
        super().__init__()
        self.whole = whole
        self.doing = doing

    def tell(self, progress: Progress) -> None:
        """Waiting for a model is part of running."""
        doing = progress.doing or self.doing
        self.whole.tell(replace(progress, state="running", doing=doing, place=None, estimated_wait_s=None))


@asynccontextmanager
async def telling(following: Following, tell: Callable[[Following], Awaitable[None]]) -> AsyncIterator[None]:
    """Meanwhile `tell` says how it is."""
    task = asyncio.ensure_future(tell(following))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def followed(work: Callable[[Following], Awaitable[Result]]) -> AsyncGenerator[Progress | Result]:
    """How far `work` is, each time that it has come further, and at last its result. Raises what it raises."""
    following = Following()
    working = asyncio.ensure_future(work(following))
    changed = asyncio.ensure_future(following.changed())
    try:
        while True:
            await asyncio.wait((working, changed), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                yield working.result()
                return
            yield changed.result()
            await asyncio.wait((working,), timeout=PAUSE_S)
            changed = asyncio.ensure_future(following.changed())
    finally:
        for task in (working, changed):
            task.cancel()
        await asyncio.gather(working, changed, return_exceptions=True)
