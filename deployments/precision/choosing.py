"""Chooses the runtime and precision of a model: measured once on this machine, then kept on disk.

`deployments.precision.measuring` measures. Engines without `calibration` and `agreement` are loaded as they are. Vision
is one: its models would not fit in memory in fp32, so its `auto` is plain half precision.
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import psutil

from deployments import aside, disk_cache
from deployments.checkpoints.layout import Layout
from deployments.checkpoints.modules import contents
from deployments.load_progress import LoadProgress
from deployments.spec import Facts, ModelSpec, Precision, Runtime

FP32_BYTES = 4
FREE_SHARE = 0.25
"""Largest share of the free memory that the original may take to be loaded for comparison."""

Way = tuple[Runtime, Precision]


def load_best(engine: Any, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Any:
    """Load the model in `folder` the best way that the spec allows. The facts say which way, and why."""
    ways = open_ways(engine, spec)
    if not ways:
        return engine.load(spec, folder, progress)
    reason = _too_large(spec, Layout.read(folder).values)
    if reason:
        loaded = engine.load(spec, folder, progress)
        reasons = filter(None, (loaded.facts.fallback_reason, reason))
        loaded.facts = replace(loaded.facts, fallback_reason="; ".join(reasons))
        return loaded
    choice = _choice(engine, spec, folder, ways, progress)
    loaded = engine.load(replace(spec, runtime=choice["runtime"], precision=choice["precision"]), folder, progress)
    facts: Facts = loaded.facts
    if (facts.runtime, facts.precision) == (choice["runtime"], choice["precision"]):
        loaded.facts = replace(facts, quality=choice["quality"], fallback_reason=choice["fallback_reason"])
    return loaded


def measure(engine: Any, spec: ModelSpec, folder: Path, progress: LoadProgress) -> dict[str, Any]:
    """Measure now, whatever is on disk, and return the choice. Raises ValueError if there is nothing to choose."""
    ways = open_ways(engine, spec) if hasattr(engine, "calibration") else []
    if not ways:
        raise ValueError(f"models with task {spec.task} and precision {spec.precision} are loaded as they are")
    if reason := _too_large(spec, Layout.read(folder).values):
        raise ValueError(reason)
    return _measured(engine, spec, folder, ways, progress)


def open_ways(engine: Any, spec: ModelSpec) -> list[Way]:
    """Ways to run a model that can be measured; none for fp32, the original, and for int4."""
    if spec.precision in ("fp32", "int4"):
        return []
    gpu = _on_gpu(spec)
    precisions: list[Precision] = [spec.precision]
    if spec.precision == "auto":
        half: list[Precision] = ["bf16"] if disk_cache.half_precision() else []
        precisions = ["fp16", "bf16"] if gpu else [*half, "int8"]
    runtimes: list[Runtime] = [spec.runtime]
    if spec.runtime == "auto":
        runtimes = ["torch"]
        if not gpu and "openvino" in engine.runtimes and importlib.util.find_spec("openvino"):
            runtimes = ["openvino", "torch"]
    return [
        (runtime, precision)
        for runtime in runtimes
        for precision in precisions
        if runtime != "openvino" or precision in ("bf16", "int8") or spec.runtime == "openvino"
    ]


def _choice(engine: Any, spec: ModelSpec, folder: Path, ways: list[Way], progress: LoadProgress) -> dict[str, Any]:
    """The choice on disk, or a new measurement, by one process of this machine at a time."""
    name = "choice-" + disk_cache.key(
        *(_path(engine), spec.precision, spec.runtime, spec.threads or disk_cache.cores()),
        disk_cache.hardware(_on_gpu(spec)),
        *(contents(folder), disk_cache.versions(), disk_cache.code(), _source(engine)),
    )
    choice = disk_cache.read(name)
    if _is_choice(choice):
        return choice
    with disk_cache.alone(name):
        choice = disk_cache.read(name)
        if not _is_choice(choice):
            choice = _measured(engine, spec, folder, ways, progress)
            if not choice["fallback_reason"] or spec.runtime == spec.precision == "auto":
                disk_cache.write(name, choice)  # next time, what was asked for may work
    return choice


def _measured(engine: Any, spec: ModelSpec, folder: Path, ways: list[Way], progress: LoadProgress) -> dict[str, Any]:
    function = "deployments.precision.measuring:choose"
    choice: dict[str, Any] = aside.run(function, _path(engine), spec, folder, ways, progress=progress)
    return choice


def _path(engine: type) -> str:
    return f"{engine.__module__}:{engine.__qualname__}"


def _source(engine: type) -> str | None:
    """Digest of the engine's source file, as users may change their own engines at any time."""
    file = inspect.getsourcefile(engine)
    return disk_cache.digest(Path(file)) if file else None


def _on_gpu(spec: ModelSpec) -> bool:
    if not spec.gpu_share:
        return False
    import torch

    return torch.cuda.is_available()


def _too_large(spec: ModelSpec, weights: int) -> str | None:
    """Why an original with this many weights can't be loaded for comparison; None if it can."""
    original = FP32_BYTES * weights
    if _on_gpu(spec):
        from deployments.memory import gpu_free_bytes

        free = gpu_free_bytes()
    else:
        free = psutil.virtual_memory().available
    if original <= FREE_SHARE * free:
        return None
    return (
        f"not measured: the original in fp32 takes {original / 2**20:.0f} MB, "
        f"more than {FREE_SHARE:.0%} of the {free / 2**20:.0f} MB of free memory"
    )


def _is_choice(choice: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(choice, dict) and {"runtime", "precision", "quality", "fallback_reason"} <= set(choice)
