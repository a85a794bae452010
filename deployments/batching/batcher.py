"""The one place where a replica's items wait for its engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve

from deployments import cache
from deployments.answers import News, Piece, Shares, take
from deployments.batching.batch_cost import BatchCost, Linger
from deployments.batching.budget import Budget
from deployments.batching.cutting import cut
from deployments.batching.runner import FAILED, EngineDead, Outcome, Runner, StepRunner
from deployments.batching.threads import ThreadChoice
from deployments.batching.waiting import LATE, TAKEN_BACK, Call, Waiting
from deployments.engines import Engine
from deployments.engines.stepping import Stepping
from deployments.memory import Memory, device_memory
from deployments.metrics import BATCH_ITEMS, BATCH_PADDED, BATCH_SECONDS, BATCH_TOKENS, DROPPED, QUEUE
from deployments.spec import ModelSpec, Refusal

logger = logging.getLogger("ray.serve")

NEWS_S = 0.25
"""Between two pieces of news to those who follow."""
WORTH_SPLITTING = 4
"""What waits is divided among free threads only in parts of so many times what starting a batch costs: the second part
then adds a fifth to the work at most."""

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


class OnceBatcher(Batcher):
    """For engines that answer a batch at once, and may run several at once, each on a thread.

    What waits is divided among the threads that are free, if there is enough of it to pay for another batch.
    """

    def __init__(self, engine: Engine[Any, Any, Any], spec: ModelSpec, runner: Runner, threads: ThreadPoolExecutor):
        super().__init__(engine, spec, runner, threads)
        self.linger = Linger(self.cost)
        self._free = [self._batched(self._run) for _ in range(parallel(engine))]
        """A way into `@serve.batch` for each thread that is free: batches of one mix up."""
        self._freed = asyncio.Event()
        self._serving: set[asyncio.Task[None]] = set()
        self._lost: BaseException | None = None

    def check(self) -> None:
        super().check()
        if self._lost:
            raise EngineDead(f"a batch was not accounted for: {self._lost!r}")

    def close(self) -> None:
        super().close()
        for task in self._serving:
            task.cancel()

    def _held(self) -> list[Waiting]:
        return self.waiting

    def _came(self, items: int) -> None:
        self.linger.arrived(items)

    async def _pump(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self.waiting:
                while not self._free:
                    self._freed.clear()
                    await self._freed.wait()
                await self._wait_for_more()
                self.waiting = self._wanted(self.waiting, time.monotonic())
                if not self.waiting:
                    continue
                batch, batched = self._next_batch(), self._free.pop()
                task = asyncio.get_running_loop().create_task(self._serve(batch, batched))
                self._serving.add(task)
                task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        if not task.cancelled():
            self._lost = self._lost or task.exception()

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
        tokens, overhead = self.budget.tokens(), self.cost.overhead_tokens
        if len(self._free) > 1:
            part = sum(waiting.tokens for waiting in self.waiting) / len(self._free)
            least = 0 if math.isinf(overhead) else round(WORTH_SPLITTING * overhead)  # unknown while all are of a size
            tokens = min(tokens, max(math.ceil(part), least))
        return self._take(overhead, self.max_items, tokens)

    async def _serve(self, batch: list[Waiting], batched: Any) -> None:
        started = time.monotonic()
        try:
            batched.set_max_batch_size(len(batch))
            await asyncio.gather(*(batched(waiting) for waiting in batch))
        except Exception:
            self._lose(batch)
        finally:
            self._free.append(batched)
            self._freed.set()
        seconds = time.monotonic() - started
        self._observe(self.runner.padded([waiting.tokens for waiting in batch]), seconds)
        self.linger.ended(len(batch), seconds)
        self._tell_followers()

    async def _run(self, batch: list[Waiting]) -> list[None]:
        await self._compute(batch)
        for waiting in batch:
            waiting.item = None  # `@serve.batch` still knows the row; its memory is wanted by others
        return [None] * len(batch)


class StepBatcher(Batcher):
    """For engines that work in steps: those that begin join those that are on their way."""

    def __init__(
        self, engine: Stepping[Any, Any, Any], spec: ModelSpec, runner: StepRunner, threads: ThreadPoolExecutor
    ) -> None:
        super().__init__(engine, spec, runner, threads)
        self.steps = engine
        self.running: list[Waiting] = []
        """In the engine, or between two of its steps."""
        self._begin = self._batched(self._run)

    def _held(self) -> list[Waiting]:
        return [*self.waiting, *self.running]

    async def _pump(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self.waiting or self.running:
                self.running = self._wanted(self.running)
                self.waiting = self._wanted(self.waiting, time.monotonic())
                batch = self._next_batch()
                if batch or self.running:
                    await self._serve(batch)

    def _next_batch(self) -> list[Waiting]:
        room = self.max_items - len(self.running)
        tokens = self.budget.tokens() - sum(running.tokens for running in self.running)
        if not self.waiting or room <= 0 or (self.running and self.waiting[0].tokens > tokens):
            return []
        return self._take(math.inf, room, tokens)  # steps pad nothing, so items of all lengths go well together

    async def _serve(self, batch: list[Waiting]) -> None:
        rows = [*self.running, *batch]
        padded = self.runner.padded([row.tokens for row in rows])
        started = time.monotonic()
        try:
            if batch:
                self._begin.set_max_batch_size(len(batch))
                await asyncio.gather(*(self._begin(waiting) for waiting in batch))
            else:
                await self._run([])
        except Exception:
            self.running = []
            self._lose(rows)
        self._observe(padded, time.monotonic() - started)
        self._tell_followers(self.running)

    async def _run(self, batch: list[Waiting]) -> list[None]:
        """Run those that begin, with those that are on their way."""
        for waiting in batch:
            waiting.item = self.steps.begin(waiting.item)
        self.running = rows = [*self.running, *batch]
        outcome = await self._compute(rows)
        self.running = [rows[row] for row in outcome.unfinished]
        going_on = set(outcome.unfinished)
        for number, row in enumerate(rows):
            if number in going_on:
                row.tokens = row.item.cost
            else:
                row.item = None  # as above
        return [None] * len(batch)


def parallel(engine: Engine[Any, Any, Any]) -> int:
    """How many batches an engine runs at once; one where it says nothing."""
    return getattr(engine, "parallel", 1)


def batcher_of(
    engine: Engine[Any, Any, Any], spec: ModelSpec, threads: ThreadPoolExecutor, memory: Memory | None = None
) -> Batcher:
    """The batcher for an engine, which runs its batches on `threads`; needs a running event loop."""
    memory = memory or device_memory(engine.facts.device)
    on_cpu = engine.facts.device == "cpu" and engine.facts.runtime == "torch" and "torch" in sys.modules
    choice = ThreadChoice(spec.threads or cache.cores()) if on_cpu else None
    if isinstance(engine, Stepping):
        return StepBatcher(engine, spec, StepRunner(engine, memory, choice), threads)
    return OnceBatcher(engine, spec, Runner(engine, memory, choice), threads)
