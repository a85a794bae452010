"""What a coalescer holds: requests, and the calls that carry their items."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from deployments.collector import Collector
from deployments.messages import ItemProgress
from serve.caller import DEFAULT_TENANT
from serve.progress import Following
from serve.queues.pace import Pace


@dataclass(eq=False)
class Parcel:
    """The items of one request, which several calls may carry."""

    items: list[Any]
    deadline: float
    """On the clock of time.monotonic."""
    collector: Collector
    done: asyncio.Future[None]
    """Fails if one of its calls fails; cancelled if the client has left."""
    following: Following | None = None
    tenant: str = DEFAULT_TENANT
    weight: float = 1.0
    """Turns the tenant gets for each turn of a tenant of weight 1."""
    turns: list[int] = field(default_factory=list)
    """Turns that each item takes."""
    sent: int = 0
    """Items that have had all their turns and are in a call."""
    turns_taken: int = 0

    @property
    def size(self) -> int:
        return sum(self.turns)

    def take(self, turns: int) -> list[int]:
        """Places of the items that these turns complete. An item with only some of its turns waits for the rest."""
        self.turns_taken += turns
        first, due = self.sent, sum(self.turns[: self.sent])
        while self.sent < len(self.items) and due + self.turns[self.sent] <= self.turns_taken:
            due += self.turns[self.sent]
            self.sent += 1
        return list(range(first, self.sent))

    def settle(self) -> None:
        if self.collector.left == 0 and not self.done.done():
            self.done.set_result(None)

    def report(self, pace: Pace, progress: ItemProgress | None = None, place: int = 0) -> None:
        """Report to the follower how many items have been answered, or how far the unanswered one at `place` is."""
        items, left = len(self.items), self.collector.left
        if self.following is None:
            return
        if progress and progress.delta is not None:
            self.following.wrote(place, progress.delta)
            return
        if progress and progress.ahead is not None and left == items:
            seconds_each = self.size / items * pace.seconds_per_turn
            self.following.queued(progress.ahead + 1, (progress.ahead + items) * seconds_each)
        elif items > 1:
            self.following.running(done=items - left, items=items)
        elif progress:
            self.following.running(tokens=progress.tokens)


@dataclass(eq=False)
class Call:
    """Items of parcels on their way to a replica and back."""

    owners: dict[int, tuple[Parcel, int]] = field(default_factory=dict)
    """By an item's number: its parcel, and its place in it."""
    left: int = 0
    """Turns of the items not answered yet."""
    items: int = 0
    """Items not answered yet."""
    begun: bool = False
    """A replica is working on it."""
    since: float | None = None
    """When the replica began what is left of it (time.monotonic); None while it has not begun."""
    task: asyncio.Task[None] | None = None

    def turns(self, numbers: Iterable[int]) -> int:
        """Turns of the items with these numbers."""
        return sum(parcel.turns[place] for parcel, place in map(self.owners.__getitem__, numbers))

    def unwanted(self) -> list[int]:
        """Numbers of items that nobody waits for any more, whether answered or not."""
        return [number for number, (parcel, _) in self.owners.items() if parcel.done.cancelled()]
