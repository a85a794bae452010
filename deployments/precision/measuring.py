"""Measures ways to run a model: how close the answers are to the original's in fp32, how fast it is, how large.

A way whose answers are too far from the original's is refused. With `precision: auto`, its weights must also take at
most 60 % of the original's bytes. Of the ways left, those about as fast as the fastest are compared, and the one
closest to the original is served. If none is left, the original is served.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from deployments.engines.registry import engine_at
from deployments.load_progress import LoadProgress
from deployments.precision.choosing import Way
from deployments.process import hold_to
from deployments.spec import CheckpointError, Facts, ModelSpec, Precision, Runtime, first_line

logger = logging.getLogger("ray.serve")

KEPT, WARNED = 0.95, 0.90
"""Lowest figures at which a candidate is kept, and kept with a warning. Below both it is refused."""
MOST_BYTES = 0.6
"""Largest share of the original's bytes that the weights may take with `precision: auto`."""
NEARLY = 0.95
"""Share of the fastest candidate's speed that counts as equally fast, as smaller differences are noise. Among equally
fast candidates the one closest to the original wins."""
SHORT, LONG = 32, 8
"""Sizes of two batches whose speed is measured: of the shortest calibration items, and of the longest. Both batches and
a single short item carry equal weight."""
TIMED_S, MAX_ROUNDS = 0.2, 4
INFORMATIVE = {"scores_cosine"}
"""Figures for information only: the cosine of whole lists of scores stays high even if their order is lost."""


@dataclass
class Candidate:
    """A way to run a model, with its measurements."""

    runtime: Runtime
    precision: Precision
    weights_mb: float | None = None
    items_per_s: dict[str, float] = field(default_factory=dict)
    """On a CPU, items per second of CPU time, so that other load on the machine does not count."""
    metrics: dict[str, float | None] = field(default_factory=dict)
    """None if a figure is not a number."""
    verdict: str = "skipped"
    """`kept`, `warned` or `refused`, by the figures; `skipped`, for the `reason` given."""
    reason: str | None = None
    fallback: str | None = None
    """Why this was loaded instead of what was asked for."""

    @property
    def name(self) -> str:
        return f"{self.precision} ({self.runtime})"

    @property
    def speed(self) -> float:
        return math.prod(self.items_per_s.values()) ** (1 / max(len(self.items_per_s), 1))

    @property
    def deciding(self) -> dict[str, float | None]:
        return {name: value for name, value in self.metrics.items() if name not in INFORMATIVE}

    @property
    def nearness(self) -> float:
        return min((-math.inf if value is None else value for value in self.deciding.values()), default=-math.inf)


def choose(engine: str, spec: ModelSpec, folder: Path, ways: list[Way], progress: LoadProgress) -> dict[str, Any]:
    """Return the `runtime` and `precision` to serve, with `quality` and `fallback_reason`. `engine` is MODULE:CLASS."""
    hold_to(spec)
    measurement = _Measurement(engine_at(engine), spec, folder, progress)
    return measurement.choose([Candidate(*way) for way in ways])


class _Measurement:
    """Loads one candidate after the other, compares it with the original, and drops it."""

    def __init__(self, engine: Any, spec: ModelSpec, folder: Path, progress: LoadProgress) -> None:
        self.engine = engine
        self.spec = spec
        self.folder = folder
        self.progress = progress
        self.clock: Callable[[], float] = time.perf_counter if torch.cuda.is_available() else time.process_time

    def choose(self, candidates: list[Candidate]) -> dict[str, Any]:
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
        """Measure a candidate, or set its `reason` for being skipped.

        If something else was loaded instead, the candidate becomes that, unless that is a candidate of its own.
        """
        try:
            loaded = self.engine.load(self._spec(candidate), self.folder, LoadProgress(lambda _: None))
        except Exception as error:  # a model may lack an operation in this precision; the original has been loaded
            candidate.verdict, candidate.reason = "refused", f"it can't be loaded: {first_line(error)}"
            return
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
            try:
                self._note(candidate, loaded, answers, self._answers(loaded))
            except CheckpointError:
                raise
            except Exception as error:  # the original can still be served
                candidate.verdict, candidate.reason = "refused", f"it fails: {first_line(error)}"
        del loaded
        _tidy()

    def _note(self, candidate: Candidate, loaded: Any, original: list[Any], answers: list[Any]) -> None:
        candidate.weights_mb = _mb(loaded.facts.weights_bytes)
        figures = self.engine.agreement(original, answers)
        candidate.metrics = {name: round(value, 4) if math.isfinite(value) else None for name, value in figures.items()}
        candidate.verdict = _verdict(candidate.nearness)
        if candidate.verdict != "kept":
            below = KEPT if candidate.verdict == "warned" else WARNED
            candidate.reason = ", ".join(
                f"{name} is not a number" if value is None else f"{name} {value}, below {below:.2f}"
                for name, value in candidate.deciding.items()
                if value is None or value < below
            )
        if candidate.verdict != "refused":
            candidate.items_per_s = self._speeds(loaded)

    def _answers(self, loaded: Any) -> list[Any]:
        return [loaded.run(list(map(loaded.prepare, group))) for group in self.engine.calibration()]

    def _speeds(self, loaded: Any) -> dict[str, float]:
        """Items per second, the best of a few rounds."""
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


def _mb(size: int) -> float:
    return round(size / 2**20, 2)


def _tidy() -> None:
    """Return the memory of dropped models to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
