"""The one place where a replica's items wait for its engine."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ray import serve

from deployments.answers import Piece, Shares, take
from deployments.budget import Budget
from deployments.cutting import cut
from deployments.engines import Engine
from deployments.memory import Memory, device_memory
from deployments.metrics import BATCH_ITEMS, BATCH_PADDED, BATCH_SECONDS, BATCH_TOKENS, DROPPED, QUEUE
from deployments.pace import BatchCost, Linger
from deployments.running import FAILED, EngineDead, Outcome, Runner
from deployments.spec import ModelSpec, Refusal

LATE = Refusal("its deadline passed before its turn came", "late")


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
    """One item of a call."""

    item: Any
    tokens: int
    deadline: float
    """On the clock of time.monotonic."""
    call: Call
    place: int


class Batcher:
    """Holds items until the engine is free, then hands `@serve.batch` one batch that is ready.

    Left to itself `@serve.batch` closes the next batch while the last one runs: at its timeout, nearly empty. So it is
    given a batch as a whole, with its size set to match and no timeout. What it hands back per item says only that the
    item has been run; results go to their calls, batch by batch, as the arrays that the engine made.
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
        self.runner = Runner(engine, memory)
        self.budget = Budget(spec.max_batch_tokens, memory)
        self.cost = BatchCost()
        self.linger = Linger(self.cost)
        self.max_items = spec.max_batch_items
        self.waiting: list[Waiting] = []
        self.items = 0
        """Waiting or running."""
        self._arrived = asyncio.Event()
        self._batched = serve.batch(max_batch_size=spec.max_batch_items, batch_wait_timeout_s=0)(self._run)
        self._pumping = asyncio.get_running_loop().create_task(self._pump())

    async def submit(self, items: list[Any], timeouts_s: list[float]) -> AsyncGenerator[Piece, None]:
        """The items' results, as they come; those that are Refusals already stay so.

        An item that has not begun to run within its timeout is refused, and one whose caller has gone never runs.
        """
        call = Call(len(items))
        now = time.monotonic()
        refused = {place: item for place, item in enumerate(items) if isinstance(item, Refusal)}
        if refused:
            call.refuse(refused)
        count = call.left
        self.waiting += (
            Waiting(item, self.engine.cost(item), now + timeout_s, call, place)
            for place, (item, timeout_s) in enumerate(zip(items, timeouts_s, strict=True))
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
            while self.waiting:
                await self._wait_for_more()
                batch = self._next_batch()
                if batch:
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
        self._drop_unwanted()
        if not self.waiting:
            return []
        lengths = [waiting.tokens for waiting in self.waiting]
        places = cut(lengths, self.cost.overhead_tokens, self.max_items, self.budget.tokens())
        batch = [self.waiting[place] for place in places]
        chosen = set(places)
        self.waiting = [waiting for place, waiting in enumerate(self.waiting) if place not in chosen]
        return batch

    def _drop_unwanted(self) -> None:
        now = time.monotonic()
        wanted = []
        for waiting in self.waiting:
            if waiting.call.gone:
                DROPPED.inc()
            elif waiting.deadline < now:
                DROPPED.inc()
                waiting.call.refuse({waiting.place: LATE})
            else:
                wanted.append(waiting)
        self.waiting = wanted

    async def _serve(self, batch: list[Waiting]) -> None:
        started = time.monotonic()
        self._batched.set_max_batch_size(len(batch))
        outcomes = await asyncio.gather(*(self._batched(waiting) for waiting in batch), return_exceptions=True)
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                waiting.call.refuse({waiting.place: Refusal(FAILED, "failed")})
        seconds = time.monotonic() - started
        padded = max(1, *(waiting.tokens for waiting in batch)) * len(batch)
        self.cost.observe(padded, seconds)
        self.budget.observe(padded, seconds, full=bool(self.waiting))
        self.linger.ended(len(batch), seconds)

    async def _run(self, batch: list[Waiting]) -> list[None]:
        BATCH_ITEMS.observe(len(batch))
        BATCH_TOKENS.observe(sum(waiting.tokens for waiting in batch))
        BATCH_PADDED.observe(max(waiting.tokens for waiting in batch) * len(batch))
        started = time.monotonic()
        items = [waiting.item for waiting in batch]
        outcome = await asyncio.get_running_loop().run_in_executor(self.thread, self.runner.run, items)
        BATCH_SECONDS.observe(time.monotonic() - started)
        self._deliver(batch, outcome)
        return [None] * len(batch)

    def _deliver(self, batch: list[Waiting], outcome: Outcome) -> None:
        for rows in outcome.did_not_fit:
            self.budget.out_of_memory(max(batch[row].tokens for row in rows) * len(rows))
        for rows, results in outcome.pieces:
            shares = Shares()
            for at, row in enumerate(rows):
                shares.add(batch[row].call, batch[row].place, at)
            for call, (places, taken) in shares.of.items():
                call.put(Piece(places, take(results, taken), {}))
        for row, refusal in outcome.refusals.items():
            batch[row].call.refuse({batch[row].place: refusal})
