"""Reassembles the results of a caller's requests, which may run in several batches.

An engine answers a batch with a list, one result per item, or with a dataclass of arrays whose first axis is the item.
Results of each batch come back as a `Piece` when it is done. `Collector` joins the pieces, and copies whole arrays if
the engine returned arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from deployments.messages import Answers, Refusal


class Shares:
    """Groups the rows of a batch, or of a piece, by owner."""

    def __init__(self) -> None:
        self.of: dict[Any, tuple[list[int], list[int]]] = {}
        """By owner: what it knows its requests by, and the rows of their results here."""

    def add(self, owner: Any, request: int, row: int) -> None:
        requests, rows = self.of.setdefault(owner, ([], []))
        requests.append(request)
        rows.append(row)


class Collector:
    """Collects the results of `count` requests from pieces."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.left = count
        self.refusals: dict[int, Refusal] = {}
        self._results: Any = None

    def put(self, places: Sequence[int], results: Any, rows: Sequence[int]) -> None:
        """Store `results[rows]` as the results of the requests at `places`."""
        self.left -= len(places)
        if not is_dataclass(results):
            self._put_list(places, results, rows)
            return
        into, out = _index(places), _index(rows)
        if self._results is None:
            if isinstance(into, slice) and len(places) == self.count:
                self._results = _each(results, lambda array: array[out])
                return
            self._results = _each(results, lambda array: np.zeros((self.count, *array.shape[1:]), array.dtype))
        for each in fields(results):
            getattr(self._results, each.name)[into] = getattr(results, each.name)[out]

    def refuse(self, place: int, refusal: Refusal) -> None:
        """Store a refusal for the request at `place`."""
        self.left -= 1
        self.refusals[place] = refusal

    def answers(self) -> Answers:
        """The collected answers, once nothing is `left`."""
        return Answers([None] * self.count if self._results is None else self._results, self.refusals)

    def _put_list(self, places: Sequence[int], results: Sequence[Any], rows: Sequence[int]) -> None:
        if self._results is None:
            self._results = [None] * self.count
        for place, row in zip(places, rows, strict=True):
            if isinstance(results[row], Refusal):
                self.refusals[place] = results[row]
            else:
                self._results[place] = results[row]


def count(results: Any) -> int:
    """Number of items in an engine's results."""
    return len(getattr(results, fields(results)[0].name) if is_dataclass(results) else results)


def take(results: Any, rows: Sequence[int]) -> Any:
    """Select rows of an engine's results."""
    if is_dataclass(results):
        picked = _index(rows)
        return _each(results, lambda array: array[picked])
    return [results[row] for row in rows]


def _index(places: Sequence[int]) -> slice | list[int]:
    """An index for these places of an array: a slice, which copies nothing, if they are consecutive."""
    if places and all(place == places[0] + number for number, place in enumerate(places)):
        return slice(places[0], places[0] + len(places))
    return list(places)


def _each(results: Any, change: Any) -> Any:
    """A copy of the dataclass with `change` applied to each array."""
    return type(results)(**{field.name: change(getattr(results, field.name)) for field in fields(results)})
