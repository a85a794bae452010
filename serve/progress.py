"""Progress of a request, for clients that follow it while they wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

from serve.waiting import end

PAUSE_S = 0.1
"""Shortest time between two progress updates of a request."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    state: Literal["queued", "running"]
    place: int | None = None
    """In the queue, from 1."""
    estimated_wait_s: float | None = None
    doing: str | None = None
    """What is under way: `embedding` or `ranking` the items, or `loading` the model."""
    loaded: float | None = None
    """Percent of the model loaded."""
    done: int | None = None
    """Items done, out of `items`."""
    items: int | None = None
    tokens: int | None = None
    """Tokens generated so far."""

    def fields(self) -> dict[str, Any]:
        """The known fields, without the state."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "state"}


class Following:
    """Holds a request's progress: written by those who work on the request, read by the one who follows it."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        """None until something is known."""
        self._changed = asyncio.Event()

    def report(self, progress: Progress) -> None:
        if progress != self.progress:
            self.progress = progress
            self._changed.set()

    def queued(self, place: int, estimated_wait_s: float) -> None:
        self.report(Progress("queued", place, round(estimated_wait_s, 2)))

    def running(self, **known: Any) -> None:
        self.report(Progress("running", **known))

    def wrote(self, place: int, delta: Any) -> None:
        """The model has written more of the answer to the request's item at `place`."""

    def at(self, doing: str) -> Following:
        """A Following for one phase of the request. It reports to this one, with `doing` as the phase."""
        return Phase(self, doing)

    async def changed(self) -> Progress:
        """Waits for the next change, then returns the progress."""
        await self._changed.wait()
        self._changed.clear()
        assert self.progress is not None
        return self.progress


class Phase(Following):
    def __init__(self, whole: Following, doing: str) -> None:
        super().__init__()
        self.whole = whole
        self.doing = doing

    def report(self, progress: Progress) -> None:
        """Reports waiting for a model as running, since the request itself runs."""
        doing = progress.doing or self.doing
        self.whole.report(replace(progress, state="running", doing=doing, place=None, estimated_wait_s=None))


@asynccontextmanager
async def reporting(following: Following, report: Callable[[Following], Awaitable[None]]) -> AsyncIterator[None]:
    """Runs `report` in the background, to report progress while the body runs."""
    task = asyncio.ensure_future(report(following))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def followed(work: Callable[[Following], Awaitable[Result]]) -> AsyncGenerator[Progress | Result]:
    """Yields the progress of `work` each time it changes, then its result. Raises what `work` raises."""
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
        await end(working, changed)
