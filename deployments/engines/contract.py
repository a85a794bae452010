"""The interface of engines. Some answer a batch in one go; others work in steps, which items join and leave."""

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
    """What every engine can do. One thread at a time calls `warm_up` and `run`; other threads call `prepare` meanwhile.

    An engine whose precision can be measured (see `choosing`) has three more attributes: `runtimes`, the ones it can
    use; `calibration()`, groups of requests, each run as a batch; and `agreement(original, answers)`, which compares
    the batches' results in fp32 with others and returns figures, of which 1 is best.
    """

    facts: Facts
    checks_files: ClassVar[bool] = False
    """Is the checkpoint's folder checked for missing and damaged files before `load`?"""

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Engine[Request, Item, Result]:
        """Read the checkpoint in `folder`. Raises CheckpointError naming the file that is missing or damaged."""

    def warm_up(self) -> None:
        """Run everything once that would otherwise delay the first request."""

    def prepare(self, request: Request) -> Item:
        """Turn a request into an item of a batch (tokenise, decode). Raises ItemError saying what to change."""

    def cost(self, item: Item) -> int:
        """Tokens of the item in a batch, before padding."""

    def run(self, items: list[Item]) -> Result:
        """Return one result per item, in order: a list, or a dataclass of arrays whose first axis is the item."""


class Work(Protocol):
    """An item that an engine is working on."""

    result: Any
    """None until it is done."""

    @property
    def cost(self) -> int:
        """Tokens that the next step reads."""

    @property
    def written(self) -> int:
        """Tokens generated so far."""


AnyWork = TypeVar("AnyWork", bound=Work)


class Stepping(Engine[Request, Item, list[Any]], Generic[Request, Item, AnyWork]):
    """An engine whose items take several passes of the model. This class implements `run`.

    If it `streams`, its works have two more methods: `take_delta()` returns what a follower gets after each step, or
    None; `end_by(deadline)` sets the time (time.monotonic) at which an answer ends with what it has.
    """

    streams: ClassVar[bool] = False

    @abstractmethod
    def begin(self, item: Item) -> AnyWork:
        """Start work on an item. Nothing is computed before its first step."""

    @abstractmethod
    def step(self, works: list[AnyWork]) -> None:
        """Advance each work by one step, all in one pass. If this raises, all are unchanged."""

    def run(self, items: list[Item]) -> list[Any]:
        """Run the items from first step to last and return their results."""
        works = [self.begin(item) for item in items]
        while left := [work for work in works if work.result is None]:
            self.step(left)
        return [work.result for work in works]
