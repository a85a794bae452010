"""What a coalescer holds: requests, and the calls in which their items travel."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from deployments.answers import Collector
from serve.caller import DEFAULT_TENANT
from serve.following import Following


@dataclass(eq=False)
class Parcel:
    """The items of one request, which may travel in several calls."""

    items: list[Any]
    deadline: float
    """On the clock of time.monotonic."""
    collector: Collector
    done: asyncio.Future[None]
    """Fails with the call that failed; cancelled where the client has gone."""
    following: Following | None = None
    tenant: str = DEFAULT_TENANT
    weight: float = 1.0
    """Turns that the tenant gets for one of another's."""
    sent: int = 0

    @property
    def size(self) -> int:
        return len(self.items)

    def settle(self) -> None:
        if self.collector.left == 0 and not self.done.done():
            self.done.set_result(None)


@dataclass(eq=False)
class Call:
    """Items of parcels on their way to a replica and back."""

    owners: list[tuple[Parcel, int]] = field(default_factory=list)
    """Of each item: its parcel, and its place there."""
    numbers: list[int] = field(default_factory=list)
    """Of each item, by which it is taken back."""
    left: int = 0
    begun: bool = False
    """No other comes before it any more."""
    since: float | None = None
    """When the replica began with what is left of it (time.monotonic); None while others come before it."""
    task: asyncio.Task[None] | None = None

    def unwanted(self) -> list[int]:
        """Numbers of items that nobody waits for any more; whether they have been answered is not asked."""
        pairs = zip(self.owners, self.numbers, strict=True)
        return [number for (parcel, _), number in pairs if parcel.done.cancelled()]
