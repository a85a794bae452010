"""Which runtime and precision a model is served in: measured once on this machine, kept on disk.

Candidates run the same calibration requests as the original in fp32. One whose answers are too far from the original's
is refused. With `precision: auto` it must also hold at most 60 % of the original's bytes; the fastest of those left is
served, or the nearest to the original among those about as fast, and the original where none is left.

Engines without `calibration` and `agreement` are loaded as they are. Vision is one: a copy in fp32 of the models that
it is for would not fit, so its `auto` is plain half precision.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import psutil
import torch

from deployments import cache, calibration
from deployments.layout import Layout
from deployments.loading import device, plain_precision
from deployments.memory import gpu_free_bytes
from deployments.progress import LoadProgress
from deployments.spec import Facts, ModelSpec, Precision, Runtime

logger = logging.getLogger("ray.serve")

KEPT, WARNED = 0.95, 0.90
"""Figures from here up are kept, and kept with a warning; below they are refused."""
MOST_BYTES = 0.6
NEARLY = 0.95
"""Of the fastest one's speed. Of those who reach it the nearest to the original wins: that much is noise."""
FP32_BYTES = 4
FREE_SHARE = 0.25
"""An original that takes more than this of the free memory is not loaded to compare with."""
SHORT, LONG = 32, 8
"""Items of two batches whose speed is measured: the shortest of the calibration, and the longest. Both and a single
short item count alike."""
TIMED_S, MAX_ROUNDS = 0.2, 4
INFORMATIVE = {"scores_cosine"}
"""Figures that decide nothing: the cosine of whole lists of scores stays high where their order is lost."""
SCHEME = 4
"""Of the measurement; another number forgets all choices."""


@dataclass
class Candidate:
    """A way to run a model, and what was measured of it."""

    runtime: Runtime
    precision: Precision
    weights_mb: float | None = None
    items_per_s: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    verdict: str = "skipped"
    """`kept`, `warned` or `refused` by the figures; `skipped` for the `reason`."""
    reason: str | None = None
    fallback: str | None = None
    """Why this was loaded where something else had been asked for."""

    @property
    def name(self) -> str:
        return f"{self.precision} ({self.runtime})"

    @property
    def speed(self) -> float:
        return math.prod(self.items_per_s.values()) ** (1 / max(len(self.items_per_s), 1))

    @property
    def nearness(self) -> float:
        return min(value for name, value in self.metrics.items() if name not in INFORMATIVE)


def load_best(engine: Any, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Any:
    """The model in `folder` as `engine` runs it best, within what the spec leaves open; the facts say what and why."""
    candidates = _candidates(engine, spec)
    if not candidates:
        return engine.load(spec, folder, progress)
    name = "choice-" + cache.key(
        SCHEME, spec.task, spec.precision, spec.runtime, spec.threads or cache.cores(), _hardware(),
        cache.files(folder), cache.versions(), calibration.digest(),
    )  # fmt: skip
    choice = cache.read(name)
    if not _is_choice(choice):
        if reason := _too_large(Layout.read(folder).values):
            loaded = engine.load(spec, folder, progress)
            reasons = filter(None, (loaded.facts.fallback_reason, reason))
            loaded.facts = replace(loaded.facts, fallback_reason="; ".join(reasons))
            return loaded
        with cache.alone(name):
            choice = cache.read(name)
            if not _is_choice(choice):
                choice = _Measurement(engine, spec, folder, progress).choose(candidates)
                if not choice["fallback_reason"] or spec.runtime == spec.precision == "auto":
                    cache.write(name, choice)  # what was asked for may be had next time
    assert choice is not None
    chosen = replace(spec, runtime=choice["runtime"], precision=choice["precision"])
    loaded = engine.load(chosen, folder, progress)
    facts: Facts = loaded.facts
    if (facts.runtime, facts.precision) == (choice["runtime"], choice["precision"]):
        loaded.facts = replace(facts, quality=choice["quality"], fallback_reason=choice["fallback_reason"])
    return loaded


def measure(engine: Any, spec: ModelSpec, folder: Path, progress: LoadProgress) -> dict[str, Any]:
    """What would be chosen and why, measured now whatever is on disk. Raises ValueError where nothing is to choose."""
    candidates = _candidates(engine, spec) if hasattr(engine, "calibration") else []
    if not candidates:
        raise ValueError(f"models with task {spec.task} and precision {spec.precision} are loaded as they are")
    if reason := _too_large(Layout.read(folder).values):
        raise ValueError(reason)
    return _Measurement(engine, spec, folder, progress).choose(candidates)


def _candidates(engine: Any, spec: ModelSpec) -> list[Candidate]:
    """What there is to measure; none for the original itself."""
    if spec.precision in ("fp32", "int4"):
        return []
    cpu = device().type == "cpu"
    precisions: list[Precision] = [spec.precision]
    if spec.precision == "auto":
        half: list[Precision] = ["bf16"] if plain_precision() == "bf16" else []
        precisions = [*half, "int8"] if cpu else ["fp16", "bf16"]
    runtimes: list[Runtime] = [spec.runtime]
    if spec.runtime == "auto":
        runtimes = ["torch"]
        if cpu and "openvino" in engine.runtimes and importlib.util.find_spec("openvino"):
            runtimes = ["openvino", "torch"]
    return [
        Candidate(runtime, precision)
        for runtime in runtimes
        for precision in precisions
        if runtime != "openvino" or precision in ("bf16", "int8") or spec.runtime == "openvino"
    ]


class _Measurement:
    """One candidate after the other is loaded, compared with the original, and dropped."""

    def __init__(self, engine: Any, spec: ModelSpec, folder: Path, progress: LoadProgress) -> None:
        self.engine = engine
        self.spec = spec
        self.folder = folder
        self.progress = progress
        self.clock: Callable[[], float] = time.perf_counter
        if device().type == "cpu" and (spec.threads or cache.cores()) == 1:
            self.clock = time.process_time  # other replicas load on the same cores meanwhile

    def choose(self, candidates: list[Candidate]) -> dict[str, Any]:
        """`runtime` and `precision` to serve, their `quality` and `fallback_reason`."""
        base = Candidate("torch", "fp32")
        original = self.engine.load(self._spec(base), self.folder, self.progress)
        self.progress.measuring()
        answers = self._answers(original)
        self._note(base, original, answers, answers)
        del original
        _tidy()
        for candidate in candidates:
            self._try(candidate, base, candidates, answers)
        best = self._best(candidates) or base
        reason, shown = best.fallback, best
        if best is base:
            reason = "; ".join(f"{each.name} {each.verdict}: {each.reason}" for each in candidates)
            reason += "; so fp32 is served"
            shown = next((each for each in candidates if each.verdict == "refused"), base)
        for line in filter(None, (reason, best.reason)):
            logger.warning("%s: %s", self.spec.name, line)
        return {
            "runtime": best.runtime,
            "precision": best.precision,
            "fallback_reason": reason,
            "quality": {
                "verdict": shown.verdict,
                "metrics": shown.metrics,
                "candidates": [asdict(each) for each in (base, *candidates)],
            },
        }

    def _best(self, candidates: list[Candidate]) -> Candidate | None:
        good = [each for each in candidates if each.verdict in ("kept", "warned")]
        fastest = max((each.speed for each in good), default=0)
        as_fast = [each for each in good if each.speed >= NEARLY * fastest]
        return max(as_fast, key=lambda each: (each.verdict == "kept", each.nearness), default=None)

    def _try(self, candidate: Candidate, base: Candidate, others: list[Candidate], answers: list[Any]) -> None:
        """Measure a candidate, or say in its `reason` why it is out of the question.

        One that can't be had becomes what was loaded in its place, unless that is measured anyway.
        """
        loaded = self.engine.load(self._spec(candidate), self.folder, LoadProgress(lambda _: None))
        facts: Facts = loaded.facts
        candidate.weights_mb = _mb(facts.weights_bytes)
        assert base.weights_mb is not None
        taken = {(each.runtime, each.precision) for each in (base, *others) if each is not candidate}
        if (facts.runtime, facts.precision) in taken:
            candidate.reason = facts.fallback_reason
        elif self.spec.precision == "auto" and candidate.weights_mb > MOST_BYTES * base.weights_mb:
            candidate.reason = f"its weights are more than {MOST_BYTES:.0%} of the original's"
        else:
            candidate.fallback = facts.fallback_reason
            candidate.runtime = cast(Runtime, facts.runtime)
            candidate.precision = cast(Precision, facts.precision)
            self._note(candidate, loaded, answers, self._answers(loaded))
        del loaded
        _tidy()

    def _note(self, candidate: Candidate, loaded: Any, original: list[Any], answers: list[Any]) -> None:
        candidate.weights_mb = _mb(loaded.facts.weights_bytes)
        figures = self.engine.agreement(original, answers)
        candidate.metrics = {name: round(value, 4) for name, value in figures.items()}
        candidate.verdict = _verdict(candidate.nearness)
        if candidate.verdict != "kept":
            low = ", ".join(
                f"{name} {value}"
                for name, value in candidate.metrics.items()
                if value < KEPT and name not in INFORMATIVE
            )
            candidate.reason = f"{low}, below {KEPT if candidate.verdict == 'warned' else WARNED:.2f}"
        if candidate.verdict != "refused":
            candidate.items_per_s = self._speeds(loaded)

    def _answers(self, loaded: Any) -> list[Any]:
        return [loaded.run(list(map(loaded.prepare, group))) for group in self.engine.calibration()]

    def _speeds(self, loaded: Any) -> dict[str, float]:
        """Items a second, the best of a few rounds."""
        items = [loaded.prepare(request) for group in self.engine.calibration() for request in group]
        items.sort(key=loaded.cost)
        speeds = {}
        for name, batch in (("single", items[:1]), ("short", items[:SHORT]), ("long", items[-LONG:])):
            rounds: list[float] = []
            while not rounds or (sum(rounds) < TIMED_S and len(rounds) < MAX_ROUNDS):
                started = self.clock()
                loaded.run(batch)
                rounds.append(self.clock() - started)
            speeds[name] = round(len(batch) / max(min(rounds), 1e-6), 1)
        return speeds

    def _spec(self, candidate: Candidate) -> ModelSpec:
        return replace(self.spec, runtime=candidate.runtime, precision=candidate.precision)


def _verdict(nearness: float) -> str:
    return "kept" if nearness >= KEPT else "warned" if nearness >= WARNED else "refused"


def _too_large(weights: int) -> str | None:
    """Why an original of so many weights can't be loaded to compare with; None where it can."""
    original = FP32_BYTES * weights
    free = gpu_free_bytes() if torch.cuda.is_available() else psutil.virtual_memory().available
    if original <= FREE_SHARE * free:
        return None
    return (
        f"not measured: the original in fp32 takes {_mb(original):.0f} MB, "
        f"more than {FREE_SHARE:.0%} of the {_mb(free):.0f} MB that are free"
    )


def _is_choice(choice: dict[str, Any] | None) -> bool:
    return choice is not None and {"runtime", "precision", "quality", "fallback_reason"} <= set(choice)


def _hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cache.processor()


def _mb(size: int) -> float:
    return round(size / 2**20, 2)


def _tidy() -> None:
    """Give the memory of what was dropped back to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
