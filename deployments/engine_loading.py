"""Loads the engine for a spec."""

from __future__ import annotations

from typing import Any

from deployments.checkpoints.checks import check
from deployments.checkpoints.sources import resolve
from deployments.engines.contract import Engine
from deployments.engines.registry import engine_class
from deployments.load_progress import LoadProgress
from deployments.precision.choosing import load_best
from deployments.spec import CheckpointError, ModelSpec


def load_engine(spec: ModelSpec, progress: LoadProgress) -> Engine[Any, Any, Any]:
    """Load the engine for a spec. Raises CheckpointError naming the file or setting at fault."""
    engine = engine_class(spec)
    folder = resolve(spec.source, spec.revision)
    if folder.is_file() and not getattr(engine, "reads_gguf", False):
        raise CheckpointError(
            f"{folder} is a GGUF file, which only task chat can load; task {spec.task} needs a folder"
        )
    if getattr(engine, "checks_files", False) and folder.is_dir():
        check(folder)
    if not hasattr(engine, "calibration"):
        return engine.load(spec, folder, progress)
    loaded: Engine[Any, Any, Any] = load_best(engine, spec, folder, progress)
    return loaded
