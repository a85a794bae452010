"""Finds and loads the engine of a task."""

from __future__ import annotations

import importlib
from typing import Any

from deployments.engines.contract import Engine
from deployments.spec import CheckpointError, first_line

ENGINES = {
    "next_word": "deployments.engines.predictor:Predictor",
    "vision": "deployments.engines.vision:Vision",
    "embedding": "deployments.engines.embedder:Embedder",
    "rerank": "deployments.engines.reranker:Reranker",
}


def engine_class(task: str) -> type[Engine[Any, Any, Any]]:
    """The engine of a task, or of `MODULE:CLASS`. Raises CheckpointError where there is none."""
    try:
        return engine_at(ENGINES.get(task, task))
    except Exception as error:  # a module of a user's may fail in any way
        raise CheckpointError(f"task {task!r}: no engine {ENGINES.get(task, task)!r} ({first_line(error)})") from error


def engine_at(path: str) -> type[Engine[Any, Any, Any]]:
    """The class at MODULE:CLASS. Raises ImportError, AttributeError or ValueError where there is none."""
    module, _, name = path.partition(":")
    engine: type[Engine[Any, Any, Any]] = getattr(importlib.import_module(module), name)
    return engine
