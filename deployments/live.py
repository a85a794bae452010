"""A loaded model at work: an engine, its thread, and what waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deployments.answers import Piece
from deployments.batching import Batcher
from deployments.engines import Engine, engine_class, load_engine
from deployments.items import Requests
from deployments.progress import LoadProgress
from deployments.running import FAILED
from deployments.spec import CheckpointError, ItemError, ModelSpec, Refusal

logger = logging.getLogger("ray.serve")

PREPARING_THREADS = 2
NICENESS = 5
"""Of an engine's thread and those that it starts: where cores are short, who refuses or hands on a request goes first,
which takes next to nothing."""
LAST_CALLS_S = 600.0
"""How long calls may still run on a model that another has taken the place of."""


class Live:
    """Prepares requests and runs them in batches, each on threads of its own, until it is retired."""

    def __init__(self, spec: ModelSpec, engine: Engine[Any, Any, Any], thread: ThreadPoolExecutor, seconds: float):
        self.spec = spec
        self.engine = engine
        self.load_seconds = seconds
        self.batcher = Batcher(engine, spec, thread)
        self.calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = thread
        self._preparing = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="prepare")

    @classmethod
    async def load(cls, spec: ModelSpec, progress: LoadProgress) -> Live:
        """Load and warm up; after a failure, which is reported and raised, nothing is left in memory."""
        progress.preparing()
        started = time.monotonic()
        thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        try:
            engine = await asyncio.get_running_loop().run_in_executor(thread, _load, spec, progress)
        except Exception as error:
            progress.failed(reason(error))
            thread.shutdown(wait=False)
            raise
        progress.ready()
        return cls(spec, engine, thread, time.monotonic() - started)

    async def run(self, requests: Requests) -> AsyncGenerator[Piece, None]:
        """A result or a Refusal per request, batch by batch."""
        if requests.taken_back:
            self.batcher.take_back(requests.taken_back)
        self.calls += 1
        self._idle.clear()
        try:
            items = await asyncio.get_running_loop().run_in_executor(self._preparing, self._prepare, requests.items)
            submitted = self.batcher.submit(items, requests.timeouts_s, requests.numbers, requests.followed)
            async with contextlib.aclosing(submitted) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self.calls -= 1
            if not self.calls:
                self._idle.set()

    async def retire(self) -> None:
        """Finish the calls that have come in, then give the memory back."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), LAST_CALLS_S)
        self.batcher.close()
        self._thread.shutdown(wait=False)
        self._preparing.shutdown(wait=False)
        memory = self.batcher.runner.memory
        del self.engine, self.batcher
        gc.collect()
        memory.release()

    def _prepare(self, requests: list[Any]) -> list[Any]:
        return [self._prepare_one(request) for request in requests]

    def _prepare_one(self, request: Any) -> Any:
        try:
            return self.engine.prepare(request)
        except ItemError as error:
            return Refusal(str(error), "invalid", error.field)
        except Exception:  # the other requests of the call are of other clients
            logger.exception("a request could not be prepared")
            return Refusal(FAILED, "failed")


def reason(error: Exception) -> str:
    """Why a model could not be loaded."""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def use_threads(count: int) -> None:
    """Let a batch be computed by so many threads, whether torch is here already, is yet to come, or never does."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


def keep_to_share(share: float) -> None:
    """Let this process take no more of its GPU's memory than its share: Ray only places by it.

    torch counts what it allocates; CUDA's own is part of the share, too.
    """
    if not 0 < share < 1:
        return
    import torch

    from deployments.footprint import CONTEXT_BYTES

    if torch.cuda.is_available():
        own = CONTEXT_BYTES / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(share - own, share / 10))


def _load(spec: ModelSpec, progress: LoadProgress) -> Engine[Any, Any, Any]:
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    if not spec.gpu_share:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # from an actor that books no GPU, Ray hides none
    engine_class(spec.task)  # its module imports torch, if at all
    use_threads(spec.threads or _cores())
    keep_to_share(spec.gpu_share)
    engine = load_engine(spec, progress)
    progress.loaded()
    engine.warm_up()
    return engine


def _cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
