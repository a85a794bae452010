"""What waits, in turns among tenants: weighted round robin, so that no flood starves another tenant."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Generic, Protocol, TypeVar


class Entrant(Protocol):
    @property
    def tenant(self) -> str: ...

    @property
    def weight(self) -> float:
        """Turns that its tenant gets for one of another's."""


E = TypeVar("E", bound=Entrant)


class Line(Generic[E]):
    """What one tenant has waiting, one at least."""

    def __init__(self, weight: float, turn: float) -> None:
        self.weight = weight
        self.turn = turn
        """When its next one is due: the line with the least is served, which adds the inverse of its weight (stride
        scheduling, Waldspurger and Weihl 1995)."""
        self.served = False
        """Of two whose turn it is, one that has had none since it came goes first."""
        self.entries: deque[E] = deque()


class FairQueue(Generic[E]):
    """Among a tenant's own, who came first is first: so whoever waits knows for how long at most.

    What is taken out and put back has its next turn behind its tenant's others.
    """

    def __init__(self) -> None:
        self.lines: dict[str, Line[E]] = {}
        """Of the tenants that have something waiting."""
        self._turn = 0.0
        """Of the line served last; it never goes back, so a tenant gains nothing by leaving and coming again."""

    def __len__(self) -> int:
        return sum(len(line.entries) for line in self.lines.values())

    def __bool__(self) -> bool:
        return bool(self.lines)

    def __iter__(self) -> Iterator[E]:
        """In the order in which they will be served if nobody comes."""
        turns = [
            (line.turn + number / line.weight, line.served or number > 0, at, entry)
            for at, line in enumerate(self.lines.values())
            for number, entry in enumerate(line.entries)
        ]
        yield from (entry for *_, entry in sorted(turns, key=lambda turn: turn[:3]))

    def put(self, entry: E) -> None:
        line = self.lines.get(entry.tenant)
        if line is None:  # not before those who have waited a turn
            line = self.lines[entry.tenant] = Line(entry.weight, self._turn + 1 / entry.weight)
        line.weight = entry.weight
        line.entries.append(entry)

    def take(self) -> E:
        """The next one. Raises ValueError where there is none."""
        line = min(self.lines.values(), key=lambda line: (line.turn, line.served))
        self._turn, line.served = line.turn, True
        line.turn += 1 / line.weight
        entry = line.entries.popleft()
        self._forget_if_empty(entry.tenant)
        return entry

    def remove(self, entry: E) -> None:
        """Raises ValueError where it does not wait."""
        if entry.tenant not in self.lines:
            raise ValueError("it does not wait")
        self.lines[entry.tenant].entries.remove(entry)
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
        if not self.lines[tenant].entries:
            del self.lines[tenant]
