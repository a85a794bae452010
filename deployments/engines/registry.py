"""Finds engine classes by name."""

from __future__ import annotations

import importlib
from typing import Any

from deployments.engines.contract import Engine
from deployments.spec import CheckpointError, ModelSpec, first_line


def engine_class(spec: ModelSpec) -> type[Engine[Any, Any, Any]]:
    """The engine class of a spec. Raises CheckpointError if it cannot be found."""
    path = spec.engine or spec.task
    try:
        return engine_at(path)
    except Exception as error:  # importing a user's module may raise anything
        raise CheckpointError(f"task {spec.task!r}: no engine {path!r} ({first_line(error)})") from error


def engine_at(path: str) -> type[Engine[Any, Any, Any]]:
    """The class at MODULE:CLASS. Raises ImportError, AttributeError or ValueError if there is none."""
    module, _, name = path.partition(":")
    engine: type[Engine[Any, Any, Any]] = getattr(importlib.import_module(module), name)
    return engine
