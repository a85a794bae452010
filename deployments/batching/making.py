"""Chooses the batcher for an engine."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deployments import disk_cache
from deployments.batching.batcher import Batcher
from deployments.batching.once import OnceBatcher
from deployments.batching.runner import Runner, StepRunner
from deployments.batching.steps import StepBatcher
from deployments.batching.threads import ThreadChoice
from deployments.engines.contract import Engine, Stepping
from deployments.memory import Memory, device_memory
from deployments.spec import ModelSpec


def batcher_of(
    engine: Engine[Any, Any, Any], spec: ModelSpec, threads: ThreadPoolExecutor, memory: Memory | None = None
) -> Batcher:
    """The batcher for an engine. It runs batches on `threads` and needs a running event loop."""
    memory = memory or device_memory(engine.facts.device)
    on_cpu = engine.facts.device == "cpu" and engine.facts.runtime == "torch" and "torch" in sys.modules
    choice = ThreadChoice(spec.threads or disk_cache.cores()) if on_cpu else None
    if isinstance(engine, Stepping):
        return StepBatcher(engine, spec, StepRunner(engine, memory, choice), threads)
    return OnceBatcher(engine, spec, Runner(engine, memory, choice), threads)
