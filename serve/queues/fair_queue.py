"""A queue in which tenants take turns: no flood starves another tenant, and no long list starves a short request."""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Entrant(Protocol):
    @property
    def tenant(self) -> str: ...

    @property
    def weight(self) -> float:
        """Turns its tenant gets for each turn of a tenant of weight 1."""

    @property
    def size(self) -> int:
        """Turns needed to serve it, at least 1."""


E = TypeVar("E", bound=Entrant)

REMEMBERED = 256
"""Idle tenants remembered at most, as anybody can make up names."""


@dataclass(eq=False)
class Queued(Generic[E]):
    entry: E
    turns_left: int
    """Turns it still needs."""
    due: float
    """When it is served, on its line's clock."""


class Line(Generic[E]):
    """The entries of one tenant; at least one."""

    def __init__(self, weight: float, turn: float) -> None:
        self.weight = weight
        self.turn = turn
        """How far it has used its turns, on the queue's clock."""
        self.queue: list[Queued[E]] = []
        """Sorted by due time."""
        self.served = 0
        """The queue's count when this line was last served; 0 if never. Of lines due at once, the lowest goes first."""
        self._clock = 0.0
        """Turns that an entry present from the start would have had if all shared evenly."""

    @property
    def entries(self) -> list[E]:
        return [each.entry for each in self.queue]

    @property
    def due(self) -> float:
        """When its first entry is served if all tenants share evenly, on the queue's clock."""
        return self.turn + self.queue[0].turns_left / self.weight

    def put(self, entry: E) -> None:
        bisect.insort(self.queue, Queued(entry, entry.size, self._clock + entry.size), key=lambda each: each.due)

    def take(self, most: int) -> tuple[E, int]:
        first = self.queue[0]
        turns = min(most, first.turns_left)
        first.turns_left -= turns
        self.turn += turns / self.weight
        self._clock += turns / len(self.queue)
        if not first.turns_left:
            del self.queue[0]
        return first.entry, turns

    def remove(self, entry: E) -> None:
        self.queue.remove(next(each for each in self.queue if each.entry is entry))


class FairQueue(Generic[E]):
    """Serves next the entry that would finish first if all shared turns evenly: tenants by weight, then their entries.

    Hardly any entry finishes later than with even sharing, and most finish sooner: a small one does not wait before
    each of its turns, and two large ones do not both finish last (Friedman and Henderson's fair sojourn protocol 2003,
    with a clock as in Demers, Keshav and Shenker's fair queueing 1989). A tenant's entries of equal size are served in
    the order of arrival.
    """

    def __init__(self, credit: int = 0) -> None:
        """`credit`: most turns a tenant of weight 1 can save up while idle.

        A tenant that comes back after more than its share lets others go first, for at most as many turns, or until
        the first entry of each waiting tenant is served.
        """
        self.credit = credit
        self.lines: dict[str, Line[E]] = {}
        """By tenant, for tenants with entries."""
        self._clock = 0.0
        """Turns so far of a tenant of weight 1 that always has entries, if all shared evenly."""
        self._served = 0
        """Entries served so far."""
        self._absent: dict[str, float] = {}
        """By idle tenant: its turn, where it resumes when it comes back."""

    def __len__(self) -> int:
        return sum(len(line.queue) for line in self.lines.values())

    def __bool__(self) -> bool:
        return bool(self.lines)

    def __iter__(self) -> Iterator[E]:
        """In the order of service if nothing more arrives."""
        served = itertools.count(self._served + 1)
        firsts = [(line.due, line.served, number, line, 0) for number, line in enumerate(self.lines.values())]
        heapq.heapify(firsts)
        while firsts:
            due, _, number, line, at = heapq.heappop(firsts)
            yield line.queue[at].entry
            if at + 1 < len(line.queue):
                due += line.queue[at + 1].turns_left / line.weight
                heapq.heappush(firsts, (due, next(served), number, line, at + 1))

    def put(self, entry: E) -> None:
        line = self.lines.get(entry.tenant)
        if line is None:
            earliest = self._clock - self.credit
            latest = max([self._clock + self.credit, *(line.due for line in self.lines.values())])
            turn = self._absent.pop(entry.tenant, earliest)
            line = self.lines[entry.tenant] = Line(entry.weight, min(max(turn, earliest), latest))
        line.weight = entry.weight
        line.put(entry)

    @property
    def next_turns(self) -> int:
        """Turns the next entry still needs. Raises ValueError if the queue is empty."""
        return self._next.queue[0].turns_left

    @property
    def _next(self) -> Line[E]:
        return min(self.lines.values(), key=lambda line: (line.due, line.served))

    def take(self, most: int = 1) -> tuple[E, int]:
        """The next entry, and how many of its turns it gets now. It leaves the queue once it has had all of them.

        Raises ValueError if the queue is empty.
        """
        line = self._next
        weights = sum(each.weight for each in self.lines.values())
        waiting = len(line.queue)
        entry, turns = line.take(most)
        self._clock += turns / weights
        if len(self.lines) == 1:  # no other was served ahead of it, so nothing is owed to it
            line.turn = max(line.turn, self._clock)
        if len(line.queue) < waiting:
            self._served += 1
            line.served = self._served
        self._forget_if_empty(entry.tenant)
        return entry, turns

    def remove(self, entry: E) -> None:
        """Raises ValueError if the entry is not in the queue."""
        if entry not in self.of(entry.tenant):
            raise ValueError("the entry is not in the queue")
        self.lines[entry.tenant].remove(entry)
        self._forget_if_empty(entry.tenant)

    def of(self, tenant: str) -> Collection[E]:
        """A tenant's entries."""
        return self.lines[tenant].entries if tenant in self.lines else ()

    def share(self, tenant: str, weight: float, expected: Collection[str] = ()) -> float:
        """Fraction of the turns that a tenant gets beside tenants that wait now and those `expected`."""
        others = sum(line.weight for name, line in self.lines.items() if name != tenant)
        return weight / (weight + others + sum(name != tenant and name not in self.lines for name in expected))

    def last(self, excess: Callable[[str], float], is_newcomer: Callable[[E], bool]) -> E:
        """The entry with the weakest claim: the last newcomer, else the last entry, of the tenant with most `excess`.

        Raises ValueError if the queue is empty.
        """
        line = self.lines[max(self.lines, key=lambda tenant: (excess(tenant), tenant))]
        newcomers = [entry for entry in line.entries if is_newcomer(entry)]
        return (newcomers or line.entries)[-1]

    def _forget_if_empty(self, tenant: str) -> None:
        line = self.lines[tenant]
        if line.queue:
            return
        del self.lines[tenant]
        self._absent[tenant] = line.turn
        if len(self._absent) > REMEMBERED:
            self._absent = {name: turn for name, turn in self._absent.items() if turn > self._clock - self.credit}
        if len(self._absent) > REMEMBERED:
            del self._absent[next(iter(self._absent))]
