"""The queue of items that wait for a replica's engine."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve

from deployments.batching.batch_cost import BatchCost
from deployments.batching.budget import Budget
from deployments.batching.cutting import cut
from deployments.batching.runner import FAILED, EngineDead, Outcome, Runner
from deployments.batching.waiting import LATE, TAKEN_BACK, IncomingCall, PendingItem
from deployments.collector import Shares, take
from deployments.engines.contract import Engine
from deployments.messages import ItemProgress, Piece, Refusal
from deployments.metrics import BATCH_ITEMS, BATCH_PADDED, BATCH_SECONDS, BATCH_TOKENS, DROPPED, QUEUE
from deployments.spec import ModelSpec

logger = logging.getLogger("ray.serve")

PROGRESS_S = 0.25
"""Seconds between two progress updates to followers."""

Run = Callable[[PendingItem], Awaitable[None]]


class Batcher:
    """Holds items until the engine is free, then passes one complete batch to `@serve.batch`.

    On its own, `@serve.batch` closes the next batch at its timeout, nearly empty, while the previous one still runs.
    Dure therefore passes it a whole batch, with the batch size set to match and no timeout. Its return value per item
    only says that the item has run. Results go to their calls batch by batch, as the arrays that the engine made.
    """

    def __init__(self, engine: Engine[Any, Any, Any], spec: ModelSpec, runner: Runner, threads: ThreadPoolExecutor):
        self.engine = engine
        self.runner = runner
        self.threads = threads
        self.budget = Budget(spec.max_batch_tokens, runner.memory)
        self.cost = BatchCost()
        self.max_items = spec.max_batch_items
        self.waiting: list[PendingItem] = []
        self.items = 0
        """Items that wait or run."""
        self._reported_at = 0.0
        self._arrived = asyncio.Event()
        self._pumping = asyncio.get_running_loop().create_task(self._pump())

    async def submit(
        self,
        items: list[Any],
        timeouts_s: list[float],
        numbers: list[int],
        followed: Sequence[int] = (),
        caller: str = "",
    ) -> AsyncGenerator[Piece, None]:
        """Yield the items' results as they arrive. Items that are already Refusals are passed through.

        An item that has not started within its timeout is refused. An item whose caller has gone is never run.
        Results and `take_back` identify items by their `numbers`. Those in `followed` get progress updates.
        """
        call = IncomingCall(len(items), caller)
        now = time.monotonic()
        refused = {number: item for number, item in zip(numbers, items, strict=True) if isinstance(item, Refusal)}
        if refused:
            call.refuse(refused)
        count = call.left
        self.waiting += (
            PendingItem(item, self.engine.cost(item), now + timeout_s, call, number, number in followed)
            for item, timeout_s, number in zip(items, timeouts_s, numbers, strict=True)
            if number not in refused
        )
        self._count(count)
        self._on_arrival(count)
        self._arrived.set()
        try:
            while call.left > 0 or call.pieces:
                for piece in await call.next():
                    yield piece
        finally:
            call.gone = True
            self._count(-count)

    def take_back(self, numbers: list[int]) -> None:
        """Cancel the items with these numbers, if they are here."""
        unwanted = set(numbers)
        for item in self._held():
            if item.number in unwanted:
                item.taken_back = True

    def check(self) -> None:
        """Raises EngineDead if the batching loop has ended or the engine cannot run batches."""
        if self._pumping.done():
            raise EngineDead(f"the batching loop has ended: {self._pumping!r}")
        self.runner.check()

    def close(self) -> None:
        """Make no more batches."""
        self._pumping.cancel()

    @abstractmethod
    async def _pump(self) -> None:
        """Make batches for as long as the batcher is open."""

    @abstractmethod
    def _held(self) -> list[PendingItem]:
        """Items that can be taken back."""

    def _on_arrival(self, items: int) -> None:
        """Called when this many items have arrived."""

    def _count(self, items: int) -> None:
        self.items += items
        QUEUE.set(self.items)

    def _batched(self, run: Callable[[list[PendingItem]], Awaitable[list[None]]]) -> Any:
        """`run` as a function of one item. Serve collects batches of the size set by `set_max_batch_size`."""
        return serve.batch(max_batch_size=self.max_items, batch_wait_timeout_s=0)(run)

    def _take(self, overhead_tokens: float, max_items: int, max_tokens: int) -> list[PendingItem]:
        """Remove the items of the next batch from the queue and return them."""
        places = cut([waiting.tokens for waiting in self.waiting], overhead_tokens, max_items, max_tokens)
        chosen = set(places)
        batch = [self.waiting[place] for place in places]
        self.waiting = [waiting for place, waiting in enumerate(self.waiting) if place not in chosen]
        return batch

    def _wanted(self, items: list[PendingItem], now: float = 0) -> list[PendingItem]:
        """The items still wanted at `now`. Late and cancelled items are refused and dropped."""
        wanted = []
        for item in items:
            if item.is_wanted(now):
                wanted.append(item)
                continue
            DROPPED.inc()
            item.item = None
            item.call.refuse({item.number: LATE if item.deadline < now else TAKEN_BACK})
        return wanted

    async def _compute(self, rows: list[PendingItem]) -> Outcome:
        """Run a batch on one of the engine's threads and deliver its outcome."""
        tokens = [row.tokens for row in rows]
        BATCH_ITEMS.observe(len(rows))
        BATCH_TOKENS.observe(sum(tokens))
        padded = self.runner.padded(tokens)
        BATCH_PADDED.observe(padded)
        started = time.monotonic()
        items = [row.item for row in rows]
        outcome = await asyncio.get_running_loop().run_in_executor(self.threads, self.runner.run, items, padded)
        BATCH_SECONDS.observe(time.monotonic() - started)
        self._deliver(rows, outcome)
        return outcome

    def _deliver(self, batch: list[PendingItem], outcome: Outcome) -> None:
        for rows in outcome.did_not_fit:
            self.budget.out_of_memory(self.runner.padded([batch[row].tokens for row in rows]))
        for done, results in outcome.pieces:
            shares = Shares()
            for at, row in enumerate(done):
                shares.add(batch[row].call, batch[row].number, at)
            for call, (numbers, taken) in shares.of.items():
                call.put(Piece(numbers, take(results, taken), {}))
        for row, refusal in outcome.refusals.items():
            batch[row].call.refuse({batch[row].number: refusal})

    def _lose(self, rows: list[PendingItem]) -> None:
        """Refuse all items of a batch that was lost to a bug in the batcher."""
        logger.exception("a batch of %d was lost", len(rows))
        for row in rows:
            row.call.refuse({row.number: Refusal(FAILED, "failed")})

    def _observe(self, padded: int, seconds: float) -> None:
        self.cost.observe(padded, seconds)
        self.budget.observe(padded, seconds, full=bool(self.waiting))

    def _report_progress(self, running: Sequence[PendingItem] = ()) -> None:
        """Send progress updates for the followed items, at most every PROGRESS_S."""
        now = time.monotonic()
        if now - self._reported_at < PROGRESS_S:
            return
        self._reported_at = now
        progress: dict[IncomingCall, dict[int, ItemProgress]] = {}
        for each in running:
            if each.followed:
                progress.setdefault(each.call, {})[each.number] = ItemProgress(tokens=each.item.written)
        for ahead, waiting in enumerate(self.waiting, len(running)):
            if waiting.followed:
                progress.setdefault(waiting.call, {})[waiting.number] = ItemProgress(ahead=ahead)
        for call, its in progress.items():
            call.put(Piece((), [], {}, its))
