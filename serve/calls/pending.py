"""What a coalescer holds: requests, and the calls in which their items travel."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from deployments.collector import Collector
from deployments.messages import News
from serve.caller import DEFAULT_TENANT
from serve.progress import Following
from serve.queues.pace import Pace


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
    turns: list[int] = field(default_factory=list)
    """That each item takes."""
    sent: int = 0
    """Items that have had all their turns, and are in a call."""
    had: int = 0
    """Turns."""

    @property
    def size(self) -> int:
        return sum(self.turns)

    def take(self, turns: int) -> list[int]:
        """The places of the items that have all their turns with these. One that has only some waits for the rest."""
        self.had += turns
        first, due = self.sent, sum(self.turns[: self.sent])
        while self.sent < len(self.items) and due + self.turns[self.sent] <= self.had:
            due += self.turns[self.sent]
            self.sent += 1
        return list(range(first, self.sent))

    def settle(self) -> None:
        if self.collector.left == 0 and not self.done.done():
            self.done.set_result(None)

    def tell(self, pace: Pace, news: News | None = None) -> None:
        """Whoever follows: that items have been answered, or how far one is that has not."""
        items, left = len(self.items), self.collector.left
        if self.following is None:
            return
        if news and news.ahead is not None and left == items:
            seconds_each = self.size / items * pace.seconds_per_item
            self.following.queued(news.ahead + 1, (news.ahead + items) * seconds_each)
        elif items > 1:
            self.following.running(done=items - left, items=items)
        elif news:
            self.following.running(tokens=news.tokens)


@dataclass(eq=False)
class Call:
    """Items of parcels on their way to a replica and back."""

    owners: list[tuple[Parcel, int]] = field(default_factory=list)
    """Of each item: its parcel, and its place there."""
    numbers: list[int] = field(default_factory=list)
    """Of each item, by which it is taken back."""
    left: int = 0
    """Turns of the items that have not been answered."""
    items: int = 0
    """How many those are."""
    begun: bool = False
    """No other comes before it any more."""
    since: float | None = None
    """When the replica began with what is left of it (time.monotonic); None while others come before it."""
    task: asyncio.Task[None] | None = None

    def turns(self, places: Iterable[int]) -> int:
        """Of the items at these places."""
        return sum(parcel.turns[own] for parcel, own in map(self.owners.__getitem__, places))

    def unwanted(self) -> list[int]:
        """Numbers of items that nobody waits for any more; whether they have been answered is not asked."""
        pairs = zip(self.owners, self.numbers, strict=True)
        return [number for (parcel, _), number in pairs if parcel.done.cancelled()]
