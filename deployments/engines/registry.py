"""Finds engines by their names."""

from __future__ import annotations

import importlib
from typing import Any

from deployments.engines.contract import Engine
from deployments.spec import CheckpointError, ModelSpec, first_line


def engine_class(spec: ModelSpec) -> type[Engine[Any, Any, Any]]:
    """The engine of a spec. Raises CheckpointError where there is none."""
    path = spec.engine or spec.task
    try:
        return engine_at(path)
    except Exception as error:  # a user's module may fail in any way
        raise CheckpointError(f"task {spec.task!r}: no engine {path!r} ({first_line(error)})") from error


def engine_at(path: str) -> type[Engine[Any, Any, Any]]:
    """The class at MODULE:CLASS. Raises ImportError, AttributeError or ValueError where there is none."""
    module, _, name = path.partition(":")
    engine: type[Engine[Any, Any, Any]] = getattr(importlib.import_module(module), name)
    return engine
