"""Batches for engines that run each batch in a single pass."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deployments.batching.batch_cost import Linger
from deployments.batching.batcher import Batcher
from deployments.batching.runner import EngineDead, Runner
from deployments.batching.waiting import PendingItem
from deployments.engines.contract import Engine
from deployments.spec import ModelSpec

WORTH_SPLITTING = 4
"""Waiting items are divided among free threads only in parts that cost at least this many times what starting a batch
costs. A second part then adds at most a fifth to the work."""


class OnceBatcher(Batcher):
    """For engines that run each batch in a single pass. Several batches may run in parallel, each on its own thread.

    Waiting items are divided among the free threads if there are enough of them to pay for another batch.
    """

    def __init__(self, engine: Engine[Any, Any, Any], spec: ModelSpec, runner: Runner, threads: ThreadPoolExecutor):
        super().__init__(engine, spec, runner, threads)
        self.linger = Linger(self.cost)
        self._free = [self._batched(self._run) for _ in range(parallel(engine))]
        """One `@serve.batch` function per free thread. Parallel batches through the same function would be mixed up."""
        self._freed = asyncio.Event()
        self._serving: set[asyncio.Task[None]] = set()
        self._lost: BaseException | None = None

    def check(self) -> None:
        super().check()
        if self._lost:
            raise EngineDead(f"delivering a batch failed: {self._lost!r}")

    def close(self) -> None:
        super().close()
        for task in self._serving:
            task.cancel()

    def _held(self) -> list[PendingItem]:
        return self.waiting

    def _on_arrival(self, items: int) -> None:
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

    def _next_batch(self) -> list[PendingItem]:
        tokens, overhead = self.budget.tokens(), self.cost.overhead_tokens
        if len(self._free) > 1:
            part = sum(waiting.tokens for waiting in self.waiting) / len(self._free)
            # The overhead is infinite while all batches have the same size.
            least = 0 if math.isinf(overhead) else round(WORTH_SPLITTING * overhead)
            tokens = min(tokens, max(math.ceil(part), least))
        return self._take(overhead, self.max_items, tokens)

    async def _serve(self, batch: list[PendingItem], batched: Any) -> None:
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
        self._report_progress()

    async def _run(self, batch: list[PendingItem]) -> list[None]:
        await self._compute(batch)
        for waiting in batch:
            waiting.item = None  # free its memory: `@serve.batch` still holds the row
        return [None] * len(batch)


def parallel(engine: Engine[Any, Any, Any]) -> int:
    """How many batches an engine runs in parallel. One by default."""
    return getattr(engine, "parallel", 1)
