"""Batches for engines that work in steps."""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deployments.batching.batcher import Batcher
from deployments.batching.runner import StepRunner
from deployments.batching.waiting import IncomingCall, PendingItem
from deployments.engines.contract import Stepping
from deployments.messages import TO_ANSWER_S, ItemProgress, Piece
from deployments.spec import ModelSpec


class StepBatcher(Batcher):
    """The batcher for engines that work in steps. New items join the running ones between two steps."""

    def __init__(
        self, engine: Stepping[Any, Any, Any], spec: ModelSpec, runner: StepRunner, threads: ThreadPoolExecutor
    ) -> None:
        super().__init__(engine, spec, runner, threads)
        self.steps = engine
        self.running: list[PendingItem] = []
        """Items in a step, or between two steps."""
        self._begin = self._batched(self._run)

    def _held(self) -> list[PendingItem]:
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

    def _next_batch(self) -> list[PendingItem]:
        """Items that can join the running ones now."""
        room = self.max_items - len(self.running)
        tokens = self.budget.tokens() - sum(running.tokens for running in self.running)
        if not self.waiting or room <= 0 or (self.running and self.waiting[0].tokens > tokens):
            return []
        return self._take(math.inf, room, tokens)  # steps do not pad, so lengths may be mixed freely

    async def _serve(self, batch: list[PendingItem]) -> None:
        """Run one step, learn from the time it takes, and tell followers how far they are."""
        pending = [*self.running, *batch]
        padded = self.runner.padded([each.tokens for each in pending])
        started = time.monotonic()
        try:
            if batch:
                self._begin.set_max_batch_size(len(batch))
                await asyncio.gather(*(self._begin(waiting) for waiting in batch))
            else:
                await self._run([])
        except Exception:
            self.running = []
            self._lose(pending)
        self._observe(padded, time.monotonic() - started)
        if self.steps.streams:
            self._send_deltas()
        self._report_progress(self.running)

    def _send_deltas(self) -> None:
        """Send what the last step wrote: one message per caller, through any one of its calls."""
        deltas: dict[str, dict[int, ItemProgress]] = {}
        carriers: dict[str, IncomingCall] = {}
        for each in self.running:
            if each.followed and not each.call.gone and (delta := each.item.take_delta()):
                carriers.setdefault(each.call.caller, each.call)
                deltas.setdefault(each.call.caller, {})[each.number] = ItemProgress(
                    tokens=each.item.written, delta=delta
                )
        for caller, its in deltas.items():
            carriers[caller].put(Piece((), [], {}, its))

    async def _run(self, batch: list[PendingItem]) -> list[None]:
        """Run one step with the new items of `batch` and those already running."""
        for waiting in batch:
            waiting.item = self.steps.begin(waiting.item)
            if self.steps.streams:
                left = waiting.deadline - time.monotonic()
                waiting.item.end_by(waiting.deadline - min(TO_ANSWER_S, left / 2))
        self.running = pending = [*self.running, *batch]
        outcome = await self._compute(pending)
        self.running = [pending[row] for row in outcome.unfinished]
        unfinished = set(outcome.unfinished)
        for row, each in enumerate(pending):
            if row in unfinished:
                each.tokens = each.item.cost
            else:
                each.item = None  # free its memory: `@serve.batch` still holds the PendingItem
        return [None] * len(batch)
