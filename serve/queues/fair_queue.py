"""What waits, in turns among tenants, so that no flood starves another tenant and no long list a short request."""

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
        """Turns that its tenant gets for one of another's."""

    @property
    def size(self) -> int:
        """How many turns it takes to serve it, from 1."""


E = TypeVar("E", bound=Entrant)

REMEMBERED = 256
"""Tenants that have nothing waiting: a bound, as anybody can make up names."""


@dataclass(eq=False)
class Waiting(Generic[E]):
    entry: E
    turns_left: int
    """Until it is served."""
    due: float
    """On its line's clock."""


class Line(Generic[E]):
    """What one tenant has waiting, one at least."""

    def __init__(self, weight: float, turn: float) -> None:
        self.weight = weight
        self.turn = turn
        """Up to where it has had its turns, on the queue's clock."""
        self.queue: list[Waiting[E]] = []
        """Who is due first is first."""
        self.served = 0
        """When an entry was served last, by the queue's count; 0: none yet. Of two lines due at once, that goes first
        which had to wait longer.
        """
        self._clock = 0.0
        """How many turns one that came first has had if all share evenly."""

    @property
    def entries(self) -> list[E]:
        return [each.entry for each in self.queue]

    @property
    def due(self) -> float:
        """When its first one is served if all tenants share evenly, on the queue's clock."""
        return self.turn + self.queue[0].turns_left / self.weight

    def put(self, entry: E) -> None:
        bisect.insort(self.queue, Waiting(entry, entry.size, self._clock + entry.size), key=lambda each: each.due)

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
    """Serves next who would be done first if all tenants had turns evenly, by weight, and a tenant's entries theirs.

    So hardly anybody is done later than with even turns, and most are sooner: who has little to ask does not wait for
    each part of it, and two who ask for much are not both done last (Friedman and Henderson's fair sojourn protocol
    2003, with a clock as in Demers, Keshav and Shenker's fair queueing 1989). Of entries of one size, a tenant's are
    served as they came.
    """

    def __init__(self, credit: int = 0) -> None:
        """`credit`: turns that a tenant of weight 1 may have at once, before others, where it has let as many pass. As
        many, or what those who wait are to have first, it lets pass at most for turns that it had before.
        """
        self.credit = credit
        self.lines: dict[str, Line[E]] = {}
        """Of the tenants that have something waiting."""
        self._clock = 0.0
        """How many turns a tenant of weight 1 that always waits has had if all share evenly."""
        self._served = 0
        """Entries so far."""
        self._absent: dict[str, float] = {}
        """Turns of tenants that have nothing waiting: where they go on if they come again."""

    def __len__(self) -> int:
        return sum(len(line.queue) for line in self.lines.values())

    def __bool__(self) -> bool:
        return bool(self.lines)

    def __iter__(self) -> Iterator[E]:
        """In the order in which they will be served if nobody comes."""
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
        """How many the next one still needs. Raises ValueError where nobody waits."""
        return self._next.queue[0].turns_left

    @property
    def _next(self) -> Line[E]:
        return min(self.lines.values(), key=lambda line: (line.due, line.served))

    def take(self, most: int = 1) -> tuple[E, int]:
        """The next one, and how many of its turns it has now. It is out once it has had all. Raises ValueError where
        nobody waits.
        """
        line = self._next
        weights = sum(each.weight for each in self.lines.values())
        waiting = len(line.queue)
        entry, turns = line.take(most)
        self._clock += turns / weights
        if len(self.lines) == 1:  # nobody has been before it for whom it would be owed anything
            line.turn = max(line.turn, self._clock)
        if len(line.queue) < waiting:
            self._served += 1
            line.served = self._served
        self._forget_if_empty(entry.tenant)
        return entry, turns

    def remove(self, entry: E) -> None:
        """Raises ValueError where it does not wait."""
        if entry not in self.of(entry.tenant):
            raise ValueError("it does not wait")
        self.lines[entry.tenant].remove(entry)
        self._forget_if_empty(entry.tenant)

    def of(self, tenant: str) -> Collection[E]:
        """A tenant's that wait."""
        return self.lines[tenant].entries if tenant in self.lines else ()

    def share(self, tenant: str, weight: float, expected: Collection[str] = ()) -> float:
        """The part of the turns that a tenant gets beside those that wait now, and those that are `expected`."""
        others = sum(line.weight for name, line in self.lines.items() if name != tenant)
        return weight / (weight + others + sum(name != tenant and name not in self.lines for name in expected))

    def last(self, excess: Callable[[str], float], is_newcomer: Callable[[E], bool]) -> E:
        """The one of least right: of the tenant that holds most in `excess` of what is its, the last newcomer, else the
        last. Raises ValueError where nobody waits.
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
