"""Measures how fast a model of a config is on this machine, without a server."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from deployments.checkpoints.sources import resolve
from deployments.engine_loading import load_engine
from deployments.engines.registry import engine_class
from deployments.load_progress import LoadProgress
from deployments.precision import choosing
from deployments.process import hold_to
from deployments.spec import Facts, ModelSpec

ROUNDS = 5
BATCH_S = 0.15
"""Seconds of a round for one batch size: as many batches as fit, at least one."""
LENGTHS = (0.25, 0.9)
"""Quantiles of the calibration items' lengths that are measured."""
NEARLY_BEST = 0.95
"""Share of the best throughput that a recommended batch size must reach."""


@dataclass(frozen=True)
class BatchSize:
    """Measurements of batches of `items` items of one length: the median of several rounds."""

    items: int
    length: int
    """Tokens of each item."""
    seconds: float
    memory_mb: float
    """On a GPU, the peak above the weights; on a CPU, the growth of the process."""

    @property
    def tokens(self) -> int:
        return self.items * self.length

    @property
    def items_per_s(self) -> float:
        return self.items / self.seconds


@dataclass(frozen=True)
class BatchSizes:
    facts: Facts
    sizes: list[BatchSize]

    def recommended(self, length: int) -> BatchSize:
        """The smallest size within 5 % of the best throughput at this length: larger batches only make items wait."""
        sizes = [size for size in self.sizes if size.length == length]
        best = max(size.items_per_s for size in sizes)
        return next(size for size in sizes if size.items_per_s >= NEARLY_BEST * best)

    @property
    def lengths(self) -> list[int]:
        return sorted({size.length for size in self.sizes})


def batch_sizes(spec: ModelSpec, sizes: list[int]) -> BatchSizes:
    """Run batches of each size, with a short and a long item. Raises ValueError if the engine has no calibration."""
    hold_to(spec)
    engine: Any = load_engine(spec, LoadProgress(lambda _: None))
    if not hasattr(engine, "calibration"):
        raise ValueError(f"the engine of task {spec.task} has no `calibration()` requests to run")
    items = [engine.prepare(request) for group in engine.calibration() for request in group]
    items.sort(key=engine.cost)
    examples = {engine.cost(item): item for item in (items[int(share * len(items))] for share in LENGTHS)}
    seconds: dict[tuple[int, int], list[float]] = defaultdict(list)
    memory: dict[tuple[int, int], float] = defaultdict(float)
    for _ in range(ROUNDS):
        for length, item in examples.items():
            for size in sizes:
                used = _Used()
                seconds[size, length].append(_time(engine, [item] * size))
                memory[size, length] = max(memory[size, length], used.mb())
    measured = [BatchSize(*key, statistics.median(seconds[key]), memory[key]) for key in seconds]
    return BatchSizes(engine.facts, measured)


def precisions(spec: ModelSpec) -> dict[str, Any]:
    """All candidates beside the original, and the choice. Raises ValueError if there is nothing to choose."""
    folder = resolve(spec.source, spec.revision)
    return choosing.measure(engine_class(spec), spec, folder, LoadProgress(lambda _: None))


def _time(engine: Any, batch: list[Any]) -> float:
    """Mean seconds per batch, over as many as fit in a round."""
    count, started = 0, time.perf_counter()
    while not count or time.perf_counter() - started < BATCH_S:
        engine.run(batch)
        count += 1
    return (time.perf_counter() - started) / count


class _Used:
    """Memory used since this object was made."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.before = self.process.memory_info().rss
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def mb(self) -> float:
        now = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self.process.memory_info().rss
        return max(0.0, (now - self.before) / 2**20)
