"""The engine alone, in a loop at its best batch size, on all cores: the upper limit for any server."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from deployments.batching.once import parallel
from deployments.engine_loading import load_engine
from deployments.load_progress import LoadProgress
from loadtests.load import Measure, Workload
from serve.config.tasks import model_spec

Draw = Callable[[int], list[Any]]
"""Makes a set of requests from a seed."""
SETS = 24
"""Sets of requests that are run in turn: servers, too, get texts, and thus shapes, that they have not seen before."""
BATCHES = (8, 16, 32, 64, 128)
TUNE_S = 1.0


class Bare:
    """One of Dure's engines without a server, running as many batches at once as it can.

    Items of similar length share a batch.
    """

    def __init__(self, task: str, source: str, precision: str, runtime: str) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        self.engine = load_engine(
            model_spec(name="bare", task=task, source=source, precision=precision, runtime=runtime),
            LoadProgress(lambda event: None),
        )
        self.engine.warm_up()
        self.precision, self.runtime = precision, runtime
        self.threads = ThreadPoolExecutor(parallel(self.engine))
        self.batches: dict[str, int] = {}

    def tune(self, workload: Workload, draw: Draw) -> None:
        """Find the best batch size for these requests. A lone client's requests run one by one."""
        if workload.clients == 1:
            self.batches[workload.name] = workload.items
            return
        sets = [self._prepared(draw(seed)) for seed in range(SETS)]
        self.batches[workload.name] = max(BATCHES, key=lambda batch: _rate(self._run(sets, batch), TUNE_S))

    def measure(self, workload: Workload, draw: Draw, seconds: float) -> tuple[Measure, Measure]:
        """Items per second with all texts tokenised beforehand, and with tokenising as part of the loop."""
        batch = self.batches[workload.name]
        sets = [draw(seed) for seed in range(SETS)]
        ready = [self._prepared(requests) for requests in sets]
        measures = []
        for passes in (self._run(ready, batch), self._prepare_and_run(sets, batch)):
            rate = _rate(passes, seconds / 2)
            p50 = 1000 * workload.items / rate if workload.clients == 1 else None
            measures.append(Measure(rate, rate / workload.items, p50))
        return measures[0], measures[1]

    def _prepared(self, requests: list[Any]) -> list[Any]:
        return sorted((self.engine.prepare(request) for request in requests), key=self.engine.cost)

    def _run(self, sets: list[list[Any]], batch: int) -> Iterator[int]:
        for items in itertools.cycle(sets):
            yield self._pass(items, batch)

    def _prepare_and_run(self, sets: list[list[Any]], batch: int) -> Iterator[int]:
        for requests in itertools.cycle(sets):
            yield self._pass(self._prepared(requests), batch)

    def _pass(self, items: list[Any], batch: int) -> int:
        batches = [items[start : start + batch] for start in range(0, len(items), batch)]
        for _ in self.threads.map(self.engine.run, batches):
            pass
        return len(items)


def _rate(passes: Iterator[int], seconds: float) -> float:
    """Items per second: the median of as many whole passes as fit, after one to warm up."""
    next(passes)
    rates = []
    begun = time.perf_counter()
    while not rates or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        items = next(passes)
        rates.append(items / (time.perf_counter() - start))
    return statistics.median(rates)
