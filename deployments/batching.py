"""The one place where a replica's items wait for its engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ray import serve

from deployments.answers import News, Piece, Shares, take
from deployments.budget import Budget
from deployments.cutting import cut
from deployments.engines import Engine
from deployments.memory import Memory, device_memory
from deployments.metrics import BATCH_ITEMS, BATCH_PADDED, BATCH_SECONDS, BATCH_TOKENS, DROPPED, QUEUE
from deployments.pace import BatchCost, Linger
from deployments.running import FAILED, EngineDead, Outcome, runner_of
from deployments.spec import ModelSpec, Refusal

logger = logging.getLogger("ray.serve")

LATE = Refusal("its deadline passed before its turn came", "late")
TAKEN_BACK = Refusal("nobody waits for it any more", "late")
NEWS_S = 0.25
"""Between two pieces of news to those who follow."""


@dataclass(eq=False)
class Call:
    """Items that were submitted together, and what has come of them and was not yet handed on."""

    left: int
    gone: bool = False
    """Nobody waits for it any more."""
    pieces: list[Piece] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, piece: Piece) -> None:
        self.left -= len(piece)
        self.pieces.append(piece)
        self.news.set()

    def refuse(self, refusals: dict[int, Refusal]) -> None:
        self.put(Piece((), [], refusals))

    async def next(self) -> list[Piece]:
        """What has come since the last time, once there is something."""
        await self.news.wait()
        self.news.clear()
        pieces, self.pieces = self.pieces, []
        return pieces


@dataclass(eq=False, slots=True)
class Waiting:
    """One item of a call that has not been answered."""

    item: Any
    tokens: int
    """That its next step reads, where the engine works in steps."""
    deadline: float
    """On the clock of time.monotonic."""
    call: Call
    place: int
    number: int
    followed: bool = False
    taken_back: bool = False
    """Nobody waits for it any more, though somebody may for others of its call."""


class Batcher:
    """Holds items until the engine is free, then hands `@serve.batch` one batch that is ready.

    Left to itself `@serve.batch` closes the next batch while the last one runs: at its timeout, nearly empty. So it is
    given a batch as a whole, with its size set to match and no timeout. What it hands back per item says only that the
    item has been run; results go to their calls, batch by batch, as the arrays that the engine made.

    Where the engine works in steps, those that begin join those that are on their way.
    """

    def __init__(
        self,
        engine: Engine[Any, Any, Any],
        spec: ModelSpec,
        thread: ThreadPoolExecutor,
        memory: Memory | None = None,
    ) -> None:
        memory = memory or device_memory(engine.facts.device)
        self.engine = engine
        self.thread = thread
        self.runner = runner_of(engine, memory)
        self.budget = Budget(spec.max_batch_tokens, memory)
        self.cost = BatchCost()
        self.linger = Linger(self.cost)
        self.max_items = spec.max_batch_items
        self.waiting: list[Waiting] = []
        self.running: list[Waiting] = []
        """In the engine, or between two of its steps."""
        self.items = 0
        """Waiting or running."""
        self._told_at = 0.0
        self._arrived = asyncio.Event()
        self._batched = serve.batch(max_batch_size=spec.max_batch_items, batch_wait_timeout_s=0)(self._run)
        self._pumping = asyncio.get_running_loop().create_task(self._pump())

    async def submit(
        self, items: list[Any], timeouts_s: list[float], numbers: list[int], followed: Sequence[int] = ()
    ) -> AsyncGenerator[Piece, None]:
        """The items' results, as they come; those that are Refusals already stay so.

        An item that has not begun to run within its timeout is refused, and one whose caller has gone never runs.
        `numbers` are those that `take_back` goes by; of those that are `followed` there is news now and then.
        """
        call = Call(len(items))
        now = time.monotonic()
        refused = {place: item for place, item in enumerate(items) if isinstance(item, Refusal)}
        if refused:
            call.refuse(refused)
        count = call.left
        self.waiting += (
            Waiting(item, self.engine.cost(item), now + timeout_s, call, place, number, number in followed)
            for place, (item, timeout_s, number) in enumerate(zip(items, timeouts_s, numbers, strict=True))
            if place not in refused
        )
        self._count(count)
        self.linger.arrived(count)
        self._arrived.set()
        try:
            while call.left > 0 or call.pieces:
                for piece in await call.next():
                    yield piece
        finally:
            call.gone = True
            self._count(-count)

    def take_back(self, numbers: list[int]) -> None:
        """Nobody waits any more for the items with these numbers, if they are here."""
        unwanted = set(numbers)
        for item in (*self.waiting, *self.running):
            if item.number in unwanted:
                item.taken_back = True

    def check(self) -> None:
        """Raises EngineDead where no batches are made any more or the engine can't run them."""
        if self._pumping.done():
            raise EngineDead(f"no batches are made any more: {self._pumping!r}")
        self.runner.check()

    def close(self) -> None:
        """Make no more batches."""
        self._pumping.cancel()

    def _count(self, items: int) -> None:
        self.items += items
        QUEUE.set(self.items)

    async def _pump(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self.waiting or self.running:
                if not self.runner.in_steps:
                    await self._wait_for_more()
                self._drop_unwanted()
                batch = self._next_batch()
                if batch or self.running:
                    await self._serve(batch)

    async def _wait_for_more(self) -> None:
        while self.waiting:
            tokens = sum(waiting.tokens for waiting in self.waiting)
            wait_s = self.linger.wait_s(len(self.waiting), tokens, self.max_items)
            if wait_s <= 0:
                return
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), wait_s)

    def _next_batch(self) -> list[Waiting]:
        room = self.max_items - len(self.running)
        tokens = self.budget.tokens() - sum(running.tokens for running in self.running)
        if not self.waiting or room <= 0 or (self.running and self.waiting[0].tokens > tokens):
            return []
        lengths = [waiting.tokens for waiting in self.waiting]
        # Steps pad nothing, so items of all lengths go well together.
        overhead = math.inf if self.runner.in_steps else self.cost.overhead_tokens
        places = cut(lengths, overhead, room, tokens)
        batch = [self.waiting[place] for place in places]
        chosen = set(places)
        self.waiting = [waiting for place, waiting in enumerate(self.waiting) if place not in chosen]
        return batch

    def _drop_unwanted(self) -> None:
        now = time.monotonic()
        self.running = [running for running in self.running if self._is_wanted(running)]
        self.waiting = [waiting for waiting in self.waiting if self._is_wanted(waiting, now)]

    def _is_wanted(self, item: Waiting, now: float = 0) -> bool:
        """Does anybody wait for it, and had it begun by its deadline? Else it is refused."""
        late = item.deadline < now
        if not (item.call.gone or item.taken_back or late):
            return True
        DROPPED.inc()
        item.item = None
        item.call.refuse({item.place: LATE if late else TAKEN_BACK})
        return False

    async def _serve(self, batch: list[Waiting]) -> None:
        rows = [*self.running, *batch]
        padded = self.runner.padded([row.tokens for row in rows])
        started = time.monotonic()
        try:
            if batch:
                self._batched.set_max_batch_size(len(batch))
                await asyncio.gather(*(self._batched(waiting) for waiting in batch))
            else:
                await self._run([])
        except Exception:
            logger.exception("a batch of %d was lost", len(rows))
            self.running = []
            for row in rows:
                row.call.refuse({row.place: Refusal(FAILED, "failed")})
        seconds = time.monotonic() - started
        self.cost.observe(padded, seconds)
        self.budget.observe(padded, seconds, full=bool(self.waiting))
        if not self.runner.in_steps:
            self.linger.ended(len(batch), seconds)
        self._tell_followers()

    def _tell_followers(self) -> None:
        """How far those are that are followed."""
        now = time.monotonic()
        if now - self._told_at < NEWS_S:
            return
        self._told_at = now
        news: dict[Call, dict[int, News]] = {}
        for running in self.running:
            if running.followed:
                news.setdefault(running.call, {})[running.place] = News(tokens=running.item.written)
        for ahead, waiting in enumerate(self.waiting, len(self.running)):
            if waiting.followed:
                news.setdefault(waiting.call, {})[waiting.place] = News(ahead=ahead)
        for call, its in news.items():
            call.put(Piece((), [], {}, its))

    async def _run(self, batch: list[Waiting]) -> list[None]:
        """Run those that begin, with those that are on their way."""
        for waiting in batch:
            waiting.item = self.runner.begin(waiting.item)
        self.running = rows = [*self.running, *batch]
        tokens = [row.tokens for row in rows]
        BATCH_ITEMS.observe(len(rows))
        BATCH_TOKENS.observe(sum(tokens))
        BATCH_PADDED.observe(self.runner.padded(tokens))
        started = time.monotonic()
        items = [row.item for row in rows]
        outcome = await asyncio.get_running_loop().run_in_executor(self.thread, self.runner.run, items)
        BATCH_SECONDS.observe(time.monotonic() - started)
        self._deliver(rows, outcome)
        self.running = [rows[row] for row in outcome.unfinished]
        going_on = set(outcome.unfinished)
        for number, row in enumerate(rows):
            if number in going_on:
                row.tokens = row.item.cost
            else:
                row.item = None  # `@serve.batch` still knows the row; its memory is wanted by others
        return [None] * len(batch)

    def _deliver(self, batch: list[Waiting], outcome: Outcome) -> None:
        for rows in outcome.did_not_fit:
            self.budget.out_of_memory(self.runner.padded([batch[row].tokens for row in rows]))
        for done, results in outcome.pieces:
            shares = Shares()
            for at, row in enumerate(done):
                shares.add(batch[row].call, batch[row].place, at)
            for call, (places, taken) in shares.of.items():
                call.put(Piece(places, take(results, taken), {}))
        for row, refusal in outcome.refusals.items():
            batch[row].call.refuse({batch[row].place: refusal})
