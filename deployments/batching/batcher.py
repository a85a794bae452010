"""The one place where a replica's items wait for its engine."""

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
from deployments.batching.waiting import LATE, TAKEN_BACK, Call, Waiting
from deployments.collector import Shares, take
from deployments.engines.contract import Engine
from deployments.messages import News, Piece, Refusal
from deployments.metrics import BATCH_ITEMS, BATCH_PADDED, BATCH_SECONDS, BATCH_TOKENS, DROPPED, QUEUE
from deployments.spec import ModelSpec

logger = logging.getLogger("ray.serve")

NEWS_S = 0.25
"""Between two pieces of news to those who follow."""

Run = Callable[[Waiting], Awaitable[None]]


class Batcher:
    """Holds items until the engine is free, then hands `@serve.batch` one batch that is ready.

    Left to itself `@serve.batch` closes the next batch while the last one runs: at its timeout, nearly empty. So it is
    given a batch as a whole, with its size set to match and no timeout. What it hands back per item says only that the
    item has been run; results go to their calls, batch by batch, as the arrays that the engine made.
    """

    def __init__(self, engine: Engine[Any, Any, Any], spec: ModelSpec, runner: Runner, threads: ThreadPoolExecutor):
        self.engine = engine
        self.runner = runner
        self.threads = threads
        self.budget = Budget(spec.max_batch_tokens, runner.memory)
        self.cost = BatchCost()
        self.max_items = spec.max_batch_items
        self.waiting: list[Waiting] = []
        self.items = 0
        """Waiting or running."""
        self._told_at = 0.0
        self._arrived = asyncio.Event()
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
        self._came(count)
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
        for item in self._held():
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

    @abstractmethod
    async def _pump(self) -> None:
        """Make batches for as long as there are items."""

    @abstractmethod
    def _held(self) -> list[Waiting]:
        """Items that can be taken back."""

    def _came(self, items: int) -> None:
        """So many items have come."""

    def _count(self, items: int) -> None:
        self.items += items
        QUEUE.set(self.items)

    def _batched(self, run: Callable[[list[Waiting]], Awaitable[list[None]]]) -> Any:
        """`run` as a function of one item, which Serve collects; `set_max_batch_size` says of how many."""
        return serve.batch(max_batch_size=self.max_items, batch_wait_timeout_s=0)(run)

    def _take(self, overhead_tokens: float, max_items: int, max_tokens: int) -> list[Waiting]:
        """Items that leave together, which wait no more."""
        places = cut([waiting.tokens for waiting in self.waiting], overhead_tokens, max_items, max_tokens)
        chosen = set(places)
        batch = [self.waiting[place] for place in places]
        self.waiting = [waiting for place, waiting in enumerate(self.waiting) if place not in chosen]
        return batch

    def _wanted(self, items: list[Waiting], now: float = 0) -> list[Waiting]:
        """Without those that nobody waits for or, at `now`, that are late, which are refused."""
        wanted = []
        for item in items:
            if item.is_wanted(now):
                wanted.append(item)
                continue
            DROPPED.inc()
            item.item = None
            item.call.refuse({item.place: LATE if item.deadline < now else TAKEN_BACK})
        return wanted

    async def _compute(self, rows: list[Waiting]) -> Outcome:
        """Run a batch on a thread of the engine's, and hand on what has come of it."""
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

    def _lose(self, rows: list[Waiting]) -> None:
        """A batch has come to nothing by a fault of this class's own."""
        logger.exception("a batch of %d was lost", len(rows))
        for row in rows:
            row.call.refuse({row.place: Refusal(FAILED, "failed")})

    def _observe(self, padded: int, seconds: float) -> None:
        self.cost.observe(padded, seconds)
        self.budget.observe(padded, seconds, full=bool(self.waiting))

    def _tell_followers(self, running: Sequence[Waiting] = ()) -> None:
        """How far those are that are followed."""
        now = time.monotonic()
        if now - self._told_at < NEWS_S:
            return
        self._told_at = now
        news: dict[Call, dict[int, News]] = {}
        for each in running:
            if each.followed:
                news.setdefault(each.call, {})[each.place] = News(tokens=each.item.written)
        for ahead, waiting in enumerate(self.waiting, len(running)):
            if waiting.followed:
                news.setdefault(waiting.call, {})[waiting.place] = News(ahead=ahead)
        for call, its in news.items():
            call.put(Piece((), [], {}, its))
