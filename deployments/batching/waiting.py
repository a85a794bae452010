"""Items that wait in a replica, and the calls that brought them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from deployments.messages import Piece, Refusal

LATE = Refusal("its deadline passed before it was run", "late")
TAKEN_BACK = Refusal("it was cancelled", "late")


@dataclass(eq=False)
class IncomingCall:
    """Items that were submitted together, with the results not yet handed on."""

    left: int
    """Items not answered yet."""
    caller: str = ""
    """Who sent it. All calls with this caller go to the same process."""
    gone: bool = False
    """The caller has left."""
    pieces: list[Piece] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, piece: Piece) -> None:
        self.left -= len(piece)
        self.pieces.append(piece)
        self.changed.set()

    def refuse(self, refusals: dict[int, Refusal]) -> None:
        self.put(Piece((), [], refusals))

    async def next(self) -> list[Piece]:
        """Wait for results, then return all since the last time."""
        await self.changed.wait()
        self.changed.clear()
        pieces, self.pieces = self.pieces, []
        return pieces


@dataclass(eq=False, slots=True)
class PendingItem:
    """One unanswered item of a call."""

    item: Any
    tokens: int
    """Tokens of the item, or of its next step if the engine works in steps."""
    deadline: float
    """On the clock of time.monotonic."""
    call: IncomingCall
    number: int
    """What the caller knows the item by."""
    followed: bool = False
    taken_back: bool = False
    """The item was cancelled. Others of its call may still be wanted."""

    def is_wanted(self, now: float) -> bool:
        """Whether somebody still waits for it and its deadline has not passed by `now`."""
        return not (self.call.gone or self.taken_back or self.deadline < now)
