"""What waits in a lane, in turns among tenants: weighted round robin, so that no flood starves another tenant."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

MAX_LINES = 1024
"""Of tenants that are remembered although they have nothing waiting."""


class Entrant(Protocol):
    @property
    def tenant(self) -> str: ...

    @property
    def weight(self) -> float:
        """Turns that its tenant gets for one of another's."""

    @property
    def has_ticket(self) -> bool:
        """Was it let in where a newcomer would not have been?"""


E = TypeVar("E", bound=Entrant)


class Line(Generic[E]):
    """What one tenant has waiting."""

    def __init__(self) -> None:
        self.weight = 1.0
        self.turn = 0.0
        """When its next one is due: the line with the least is served, which adds the inverse of its weight (stride
        scheduling, Waldspurger and Weihl 1995)."""
        self.entries: deque[E] = deque()

    def __len__(self) -> int:
        return len(self.entries)


class FairQueue(Generic[E]):
    """Among a tenant's own, who came first is first: so whoever waits knows for how long at most."""

    def __init__(self) -> None:
        self.lines: dict[str, Line[E]] = {}
        self._turn = 0.0
        """Of the line served last."""

    def __len__(self) -> int:
        return sum(len(line) for line in self.lines.values())

    def __iter__(self) -> Iterator[E]:
        """In the order in which they will be served if nobody comes."""
        turns = [
            (line.turn + number / line.weight, at, entry)
            for at, line in enumerate(self.lines.values())
            for number, entry in enumerate(line.entries)
        ]
        yield from (entry for _, _, entry in sorted(turns, key=lambda turn: turn[:2]))

    def put(self, entry: E) -> None:
        line = self.lines.setdefault(entry.tenant, Line())
        if not line:
            line.turn = max(line.turn, self._turn + 1 / entry.weight)  # not before those who have waited a turn
        line.weight = entry.weight
        line.entries.append(entry)

    def take(self) -> E:
        """The next one. Raises ValueError where there is none."""
        line = min((line for line in self.lines.values() if line), key=lambda line: line.turn)
        self._turn = line.turn
        line.turn += 1 / line.weight
        entry = line.entries.popleft()
        self._forget_idle()
        return entry

    def remove(self, entry: E) -> None:
        """Raises ValueError where it does not wait."""
        self.lines[entry.tenant].entries.remove(entry)
        self._forget_idle()

    def held(self, tenant: str) -> int:
        """How many of a tenant's wait."""
        return len(self.lines.get(tenant, ()))

    def share(self, tenant: str, weight: float) -> float:
        """The part of the turns that a tenant gets beside those that wait now."""
        others = sum(line.weight for name, line in self.lines.items() if name != tenant and line)
        return weight / (weight + others)

    def last(self, excess: Callable[[str], float]) -> E:
        """The one of least right: of the tenant that holds most in `excess` of what is its, the last newcomer, else the
        last. Raises ValueError where nobody waits.
        """
        line = max((excess(name), name, line) for name, line in self.lines.items() if line)[2]
        newcomers = [entry for entry in line.entries if not entry.has_ticket]
        return (newcomers or line.entries)[-1]

    def _forget_idle(self) -> None:
        if len(self.lines) > MAX_LINES:
            self.lines = {name: line for name, line in self.lines.items() if line}
