"""The one place where a replica's items wait for its engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve

from deployments.engines import Engine
from deployments.metrics import BATCH_ITEMS, BATCH_SECONDS, BATCH_TOKENS, OUT_OF_MEMORY, QUEUE
from deployments.spec import ItemError, ModelSpec, Refusal

logger = logging.getLogger("ray.serve")

FAILURES_BEFORE_TEST = 3
"""So many items failing in a row put the engine to the test: it has to run its own warm-up."""
MAX_STALL_S = 600.0
"""An engine that has not come back from one batch for this long is dead."""


_FAILED = "the model failed on this item; the reason is in the replica's log"


class EngineDead(Exception):
    """The engine fails whatever it is given, so the replica has to be replaced."""


class Batcher:
    """Holds items until the engine is free, then hands `@serve.batch` all that wait, up to the batch limit, as one.

    Left to itself `@serve.batch` closes the next batch while the last one runs: at its timeout, nearly empty. So it is
    given a batch that is ready, with its size set to match and no timeout.

    An item that makes a batch fail fails alone: the batch is run again one item at a time.
    """

    def __init__(self, engine: Engine[Any, Any, Any], spec: ModelSpec, thread: ThreadPoolExecutor) -> None:
        self.engine = engine
        self.thread = thread
        self.waiting = 0
        self.failures = 0
        self.dead = ""
        self.busy_since: float | None = None
        self.max_items = spec.max_batch_items
        self._items: deque[tuple[Any, asyncio.Future[Any]]] = deque()
        self._arrived = asyncio.Event()
        self._batched = serve.batch(max_batch_size=spec.max_batch_items, batch_wait_timeout_s=0)(self._run)
        self._pumping = asyncio.get_running_loop().create_task(self._pump())

    async def submit(self, item: Any) -> Any:
        """The item's result, or a Refusal. An item whose caller is cancelled while it waits is never run."""
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._items.append((item, result))
        self._arrived.set()
        self.waiting += 1
        QUEUE.set(self.waiting)
        try:
            return await result
        finally:
            self.waiting -= 1
            QUEUE.set(self.waiting)

    def check(self) -> None:
        """Raises EngineDead where the engine hangs, or fails even what it warmed up with."""
        if self._pumping.done():
            raise EngineDead(f"no batches are made any more: {self._pumping!r}")
        if self.busy_since is not None and time.monotonic() - self.busy_since > MAX_STALL_S:
            raise EngineDead(f"the engine has not come back from a batch for {MAX_STALL_S:.0f} s")
        if self.dead:
            raise EngineDead(f"the engine fails whatever it is given: {self.dead}")

    async def _pump(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._next_batch():
                self._batched.set_max_batch_size(len(batch))
                results = await asyncio.gather(*(self._batched(item) for item, _ in batch), return_exceptions=True)
                for (_, future), result in zip(batch, results, strict=True):
                    if not future.done():
                        future.set_result(Refusal(_FAILED, "failed") if isinstance(result, BaseException) else result)

    def _next_batch(self) -> list[tuple[Any, asyncio.Future[Any]]]:
        batch: list[tuple[Any, asyncio.Future[Any]]] = []
        while self._items and len(batch) < self.max_items:
            item, future = self._items.popleft()
            if not future.done():
                batch.append((item, future))
        return batch

    async def _run(self, items: list[Any]) -> list[Any]:
        loop = asyncio.get_running_loop()
        BATCH_ITEMS.observe(len(items))
        BATCH_TOKENS.observe(sum(map(self.engine.cost, items)))
        self.busy_since = started = time.monotonic()
        try:
            return await loop.run_in_executor(self.thread, self._run_here, items)
        finally:
            self.busy_since = None
            BATCH_SECONDS.observe(time.monotonic() - started)

    def _run_here(self, items: list[Any]) -> list[Any]:
        try:
            results = self.engine.run(items)
            self.failures = 0
            return results
        except Exception as error:  # an engine may trip over anything; its neighbours must not
            logger.warning("a batch of %d failed: %r", len(items), error)
            if _out_of_memory(error):
                OUT_OF_MEMORY.inc()
            if len(items) > 1:
                return [result for item in items for result in self._run_here([item])]
            if isinstance(error, ItemError):
                return [Refusal(str(error), "invalid", error.field)]
            self.failures += 1
            if self.failures >= FAILURES_BEFORE_TEST:
                self._test()
            if _out_of_memory(error):
                return [Refusal("this item alone needs more memory than there is; make it smaller", "too_large")]
            return [Refusal(_FAILED, "failed")]

    def _test(self) -> None:
        """Tell a dead engine from one that was given bad items."""
        try:
            self.engine.warm_up()
            self.failures = 0
        except Exception as error:
            self.dead = repr(error)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
