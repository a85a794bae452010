"""A loaded model: an engine, its threads, and the items that wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from deployments import disk_cache
from deployments.batching.making import batcher_of
from deployments.batching.once import parallel
from deployments.batching.runner import FAILED
from deployments.batching.steps import StepBatcher
from deployments.batching.waiting import LATE, TAKEN_BACK
from deployments.checkpoints.modules import contents
from deployments.checkpoints.sources import resolve
from deployments.engine_loading import load_engine
from deployments.engines.contract import Engine
from deployments.load_progress import LoadProgress
from deployments.messages import Piece, Refusal, Requests
from deployments.process import hold_to
from deployments.spec import CheckpointError, ItemError, ModelSpec, first_line

logger = logging.getLogger("ray.serve")

PREPARING_THREADS = 2
NICENESS = 5
"""Niceness of engine threads and the threads they start. When cores are short, handling requests goes first: it costs
almost no CPU time."""
LAST_CALLS_S = 600.0
"""How long calls may still run on a model that a reload has replaced."""


class Live:
    """Prepares requests and runs them in batches, on separate threads, until it is retired."""

    def __init__(
        self, spec: ModelSpec, engine: Engine[Any, Any, Any], threads: ThreadPoolExecutor, seconds: float, content: str
    ) -> None:
        self.spec = spec
        self.content = content
        """Hash of the checkpoint's files: the same path may have held other weights before."""
        self.engine = engine
        self.load_seconds = seconds
        self.parallel = parallel(engine)
        if self.parallel > 1:
            threads.shutdown(wait=False)
            threads = _threads(self.parallel)
        self.batcher = batcher_of(engine, spec, threads)
        self.calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._threads = threads
        self._preparing = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="prepare")
        self._in_preparation: set[Preparation] = set()

    @classmethod
    async def load(cls, spec: ModelSpec, progress: LoadProgress) -> Live:
        """Load and warm up. A failure is reported and raised, and leaves nothing in memory."""
        progress.preparing()
        started = time.monotonic()
        threads = _threads(1)
        try:
            engine, content = await asyncio.get_running_loop().run_in_executor(threads, _load, spec, progress)
        except Exception as error:
            progress.failed(reason(error))
            threads.shutdown(wait=False)
            raise
        progress.ready()
        return cls(spec, engine, threads, time.monotonic() - started, content)

    async def run(self, requests: Requests) -> AsyncGenerator[Piece, None]:
        """Yield a result or a Refusal per request, batch by batch."""
        if requests.taken_back:
            self.batcher.take_back(requests.taken_back)
            for preparation in self._in_preparation:
                preparation.unwanted.update(requests.taken_back)
        self.calls += 1
        self._idle.clear()
        preparation = Preparation(requests, time.monotonic())
        self._in_preparation.add(preparation)
        try:
            items = await asyncio.get_running_loop().run_in_executor(
                self._preparing, preparation.run, self.engine.prepare
            )
            self._in_preparation.discard(preparation)
            submitted = self.batcher.submit(
                items, requests.timeouts_s, requests.numbers, requests.followed, requests.caller
            )
            async with contextlib.aclosing(submitted) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            preparation.gone = True
            self._in_preparation.discard(preparation)
            self.calls -= 1
            if not self.calls:
                self._idle.set()

    async def retire(self) -> None:
        """Finish the calls already received, then free the memory."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), LAST_CALLS_S)
        self.batcher.close()
        self._threads.shutdown(wait=False)
        self._preparing.shutdown(wait=False)
        memory = self.batcher.runner.memory
        del self.engine, self.batcher
        gc.collect()
        memory.release()

    @property
    def in_steps(self) -> bool:
        """Whether the engine works in steps, between which items join and leave."""
        return isinstance(self.batcher, StepBatcher)


@dataclass(eq=False)
class Preparation:
    """Turns the requests of a call into items, one by one, skipping those nobody waits for any more."""

    requests: Requests
    since: float
    gone: bool = False
    """Nobody waits for this call any more."""
    unwanted: set[int] = field(default_factory=set)
    """Numbers of the requests that were taken back."""

    def run(self, prepare: Callable[[Any], Any]) -> list[Any]:
        """Return an item or a Refusal for each request."""
        asked = zip(self.requests.items, self.requests.timeouts_s, self.requests.numbers, strict=True)
        return [self._one(prepare, request, timeout_s, number) for request, timeout_s, number in asked]

    def _one(self, prepare: Callable[[Any], Any], request: Any, timeout_s: float, number: int) -> Any:
        if self.gone or number in self.unwanted:
            return TAKEN_BACK
        if time.monotonic() > self.since + timeout_s:
            return LATE
        try:
            return prepare(request)
        except ItemError as error:
            return Refusal(str(error), "invalid", error.field, error.code)
        except Exception:  # other clients' requests share this call
            logger.exception("preparing a request failed")
            return Refusal(FAILED, "failed")


def reason(error: Exception) -> str:
    """Why loading a model failed."""
    return str(error) if isinstance(error, CheckpointError) else first_line(error)


def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="engine", initializer=_yield_to_others)


def _yield_to_others() -> None:
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _load(spec: ModelSpec, progress: LoadProgress) -> tuple[Engine[Any, Any, Any], str]:
    hold_to(spec)
    content = disk_cache.key(contents(resolve(spec.source, spec.revision)))
    engine = load_engine(spec, progress)
    progress.loaded()
    engine.warm_up()
    return engine, content
