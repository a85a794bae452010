"""Plain Python and torch: load a model, run a batch, say what an item costs. Nothing here knows Ray or HTTP.

An engine is one class in one file; to serve a new kind of model, write one and name it in a config as
`task: MODULE:CLASS`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol, TypeVar

from deployments.checkpoint_files import check
from deployments.choosing import load_best
from deployments.progress import LoadProgress
from deployments.sources import resolve
from deployments.spec import CheckpointError, Facts, ModelSpec, first_line

Request = TypeVar("Request", contravariant=True)
Item = TypeVar("Item")
Result = TypeVar("Result", covariant=True)

ENGINES = {
    "next_word": "deployments.engines.predictor:Predictor",
    "vision": "deployments.engines.vision:Vision",
    "embedding": "deployments.engines.embedder:Embedder",
    "rerank": "deployments.engines.reranker:Reranker",
}


class Engine(Protocol[Request, Item, Result]):
    """What every engine can do. One thread at a time calls `warm_up` and `run`; `prepare` runs beside them.

    An engine whose precision is to be measured (see `choosing`) has three things more: `runtimes`, those that it can
    use; `calibration()`, groups of requests, each of which is run as a batch; and `agreement(original, answers)`, which
    compares the batches' results in fp32 with others and returns figures of which 1 is the best.
    """

    facts: Facts

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Engine[Request, Item, Result]:
        """Read the checkpoint in `folder`. Raises CheckpointError naming the file that is missing or damaged."""

    def warm_up(self) -> None:
        """Run once what the first request would otherwise wait for."""

    def prepare(self, request: Request) -> Item:
        """Turn a request into an item of a batch (tokenise, decode). Raises ItemError saying what to change."""

    def cost(self, item: Item) -> int:
        """Tokens that the item takes up in a batch, before padding."""

    def run(self, items: list[Item]) -> Result:
        """One result per item, in order: a list, or a dataclass of arrays whose first axis is the item."""


def load_engine(spec: ModelSpec, progress: LoadProgress) -> Engine[Any, Any, Any]:
    """The spec's engine, loaded. Raises CheckpointError naming the file or setting at fault."""
    engine = engine_class(spec.task)
    folder = resolve(spec.source, spec.revision)
    if spec.task in ENGINES:
        check(folder)
    if not hasattr(engine, "calibration"):
        return engine.load(spec, folder, progress)
    loaded: Engine[Any, Any, Any] = load_best(engine, spec, folder, progress)
    return loaded


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
