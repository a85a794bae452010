"""Engines that work in steps: items join and leave between them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Generic, Protocol, TypeVar

from deployments.engines import Engine, Item, Request


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
