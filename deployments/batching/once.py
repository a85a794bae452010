"""Batches for engines that answer a batch at once."""

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
from deployments.batching.waiting import Waiting
from deployments.engines.contract import Engine
from deployments.spec import ModelSpec

WORTH_SPLITTING = 4
"""What waits is divided among free threads only in parts of so many times what starting a batch costs: the second part
then adds a fifth to the work at most."""


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


def parallel(engine: Engine[Any, Any, Any]) -> int:
    """How many batches an engine runs at once; one where it says nothing."""
    return getattr(engine, "parallel", 1)
