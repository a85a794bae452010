"""The one Serve class that all model deployments are made from."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Protocol

from ray import serve

from deployments.batching import Batcher
from deployments.engines import Engine, load_engine
from deployments.loopback import keep_to_loopback
from deployments.metrics import GPU_MEMORY, LOAD_SECONDS, REGISTRY, WEIGHTS
from deployments.progress import LoadEvent, LoadProgress
from deployments.spec import CheckpointError, Facts, ItemError, ModelSpec, Refusal, TooLarge

PREPARING_THREADS = 2


class Outlet(Protocol):
    """Where a replica tells how it is. Implementations don't block: telling costs well under a millisecond."""

    def open(self, model: str, replica: str, registry: Any) -> None: ...

    def event(self, event: LoadEvent) -> None: ...

    def facts(self, facts: dict[str, Any]) -> None: ...


class ModelReplica:
    """Loads one model once, warms it up, and answers lists of requests in batches.

    Serve sends it no request before the constructor has returned, so a new replica is warm before it takes traffic.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, spec: ModelSpec, outlet_class: type[Outlet]
    ) -> None:
        keep_to_loopback()
        self.spec = spec
        self.engine_thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self.preparing = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="prepare")
        outlet = outlet_class()
        outlet.open(spec.name, _replica_id(), REGISTRY)
        progress = LoadProgress(outlet.event)
        progress.preparing()
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            self.engine = await loop.run_in_executor(self.engine_thread, self._load, progress)
        except Exception as error:
            reason = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            progress.failed(reason)
            await asyncio.sleep(0.5)  # the process ends with this constructor; let the report leave first
            raise
        self.batcher = Batcher(self.engine, spec, self.engine_thread)
        seconds = time.monotonic() - started
        facts: Facts = self.engine.facts
        WEIGHTS.set(facts.weights_bytes)
        LOAD_SECONDS.set(seconds)
        outlet.facts(asdict(facts) | {"load_seconds": round(seconds, 2), "pid": os.getpid()})
        progress.ready()

    def _load(self, progress: LoadProgress) -> Engine[Any, Any, Any]:
        import torch

        torch.set_num_threads(self.spec.threads or _cores())
        loaded = load_engine(self.spec, progress)
        progress.loaded()
        loaded.warm_up()
        if torch.cuda.is_available():
            GPU_MEMORY.set_function(torch.cuda.memory_allocated)
        return loaded

    async def run(self, requests: list[Any]) -> list[Any]:
        """One result or Refusal per request, in order."""
        loop = asyncio.get_running_loop()
        items = await loop.run_in_executor(self.preparing, self._prepare, requests)
        return await asyncio.gather(*map(self._submit, items))

    async def check_health(self) -> None:
        """Raises where the engine is dead; Serve then replaces this replica."""
        self.batcher.check()

    def _prepare(self, requests: list[Any]) -> list[Any]:
        return [self._prepare_one(request) for request in requests]

    def _prepare_one(self, request: Any) -> Any:
        try:
            return self.engine.prepare(request)
        except TooLarge as error:
            return Refusal(str(error), "too_large", error.field)
        except ItemError as error:
            return Refusal(str(error), "invalid", error.field)

    async def _submit(self, item: Any) -> Any:
        return item if isinstance(item, Refusal) else await self.batcher.submit(item)


def _cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _replica_id() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)
