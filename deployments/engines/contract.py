"""What an engine is: one that answers a batch at once, or one that works in steps, which items join and leave."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from deployments.load_progress import LoadProgress
from deployments.spec import Facts, ModelSpec

Request = TypeVar("Request", contravariant=True)
Item = TypeVar("Item")
Result = TypeVar("Result", covariant=True)


class Engine(Protocol[Request, Item, Result]):
    """What every engine can do. One thread at a time calls `warm_up` and `run`; `prepare` runs beside them.

    An engine whose precision is to be measured (see `choosing`) has three things more: `runtimes`, those that it can
    use; `calibration()`, groups of requests, each of which is run as a batch; and `agreement(original, answers)`, which
    compares the batches' results in fp32 with others and returns figures of which 1 is the best.
    """

    facts: Facts
    checks_files: ClassVar[bool] = False
    """Is the checkpoint's folder checked for missing and damaged files before `load`?"""

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


class Work(Protocol):
    """An item on its way."""

    result: Any
    """None until it is done."""

    @property
    def cost(self) -> int:
        """Tokens that its next step reads."""

    @property
    def written(self) -> int:
        """Tokens that it has come to so far."""


AnyWork = TypeVar("AnyWork", bound=Work)


class Stepping(Engine[Request, Item, list[Any]], Generic[Request, Item, AnyWork]):
    """An engine whose items take several passes of the model. It leaves `run` to this class."""

    @abstractmethod
    def begin(self, item: Item) -> AnyWork:
        """Take up an item. Nothing is computed before its first step."""

    @abstractmethod
    def step(self, works: list[AnyWork]) -> None:
        """Take each one step further, all in one pass. Where this raises, all are as they were."""

    def run(self, items: list[Item]) -> list[Any]:
        """The items' results, from first step to last."""
        works = [self.begin(item) for item in items]
        while left := [work for work in works if work.result is None]:
            self.step(left)
        return [work.result for work in works]
