"""A loaded model at work: an engine, its thread, and what waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deployments import cache
from deployments.answers import Piece
from deployments.batching import Batcher
from deployments.checkpoint_files import contents
from deployments.engines import Engine, load_engine
from deployments.items import Requests
from deployments.process import hold_to
from deployments.progress import LoadProgress
from deployments.running import FAILED
from deployments.sources import resolve
from deployments.spec import CheckpointError, ItemError, ModelSpec, Refusal, first_line

logger = logging.getLogger("ray.serve")

PREPARING_THREADS = 2
NICENESS = 5
"""Of an engine's thread and those that it starts: where cores are short, who refuses or hands on a request goes first,
which takes next to nothing."""
LAST_CALLS_S = 600.0
"""How long calls may still run on a model that another has taken the place of."""


class Live:
    """Prepares requests and runs them in batches, each on threads of its own, until it is retired."""

    def __init__(
        self, spec: ModelSpec, engine: Engine[Any, Any, Any], thread: ThreadPoolExecutor, seconds: float, content: str
    ) -> None:
        self.spec = spec
        self.content = content
        """Tells these weights from others that lay at the same place before."""
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
            engine, content = await asyncio.get_running_loop().run_in_executor(thread, _load, spec, progress)
        except Exception as error:
            progress.failed(reason(error))
            thread.shutdown(wait=False)
            raise
        progress.ready()
        return cls(spec, engine, thread, time.monotonic() - started, content)

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
    return str(error) if isinstance(error, CheckpointError) else first_line(error)


def _load(spec: ModelSpec, progress: LoadProgress) -> tuple[Engine[Any, Any, Any], str]:
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    hold_to(spec)
    content = cache.key(contents(resolve(spec.source, spec.revision)))
    engine = load_engine(spec, progress)
    progress.loaded()
    engine.warm_up()
    return engine, content
