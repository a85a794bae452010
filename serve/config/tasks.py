"""The tasks that a model can have. Each task is one entry here, and nothing else in Dure lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from deployments.spec import ModelSpec


@dataclass(frozen=True)
class Task:
    engine: str
    """MODULE:CLASS of the engine that runs such models."""
    endpoints: tuple[str, ...]
    """Endpoints shown once the server is ready. `{name}` stands for the model's name."""
    example: tuple[str, str] | None = None
    """Path and JSON body of a request to try."""
    footprint: str = ""
    """MODULE:FUNCTION that works out a replica's GPU memory. Empty if it is unknown."""


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "next_word": Task(
            "deployments.engines.predictor:Predictor",
            ("POST /predict",),
            ("/predict", '{"text": "오늘 날씨가"}'),
            "deployments.checkpoints.footprint:next_word",
        ),
        "vision": Task(
            "deployments.engines.vision:Vision",
            ("POST /v1/vision/validate", "POST /v1/vision/judge"),
            footprint="deployments.checkpoints.footprint:vision",
        ),
        "embedding": Task(
            "deployments.engines.embedder:Embedder",
            ("POST /v1/embeddings",),
            ("/v1/embeddings", '{"input": "hello"}'),
            "deployments.checkpoints.footprint:encoder",
        ),
        "rerank": Task(
            "deployments.engines.reranker:Reranker",
            ("POST /v1/rerank",),
            ("/v1/rerank", '{"query": "deposit", "documents": ["The deposit is due.", "It rains."]}'),
            "deployments.checkpoints.footprint:encoder",
        ),
        "chat": Task(
            "deployments.engines.chat:Chat",
            ("POST /v1/chat/completions", "POST /v1/completions", "POST /api/chat"),
            ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "What is a deposit?"}]}'),
            "deployments.checkpoints.footprint:chat",
        ),
    }
)


def task_of(name: str) -> Task:
    """The task with this name. An unknown name must be MODULE:CLASS of an engine outside Dure."""
    return TASKS.get(name) or Task(name, ("POST /v1/models/{name}/run",))


def model_spec(name: str, task: str, source: str, **more: Any) -> ModelSpec:
    """The spec of a model with this task. `more` are further fields of ModelSpec."""
    known = task_of(task)
    return ModelSpec(name, task, source, engine=known.engine, footprint=known.footprint, **more)
