"""Items that wait in a replica, and the calls that they came in."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from deployments.messages import Piece, Refusal

LATE = Refusal("its deadline passed before its turn came", "late")
TAKEN_BACK = Refusal("nobody waits for it any more", "late")


@dataclass(eq=False)
class Call:
    """Items that were submitted together, and what has come of them and was not yet handed on."""

    left: int
    gone: bool = False
    """Nobody waits for it any more."""
    pieces: list[Piece] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, piece: Piece) -> None:
        self.left -= len(piece)
        self.pieces.append(piece)
        self.news.set()

    def refuse(self, refusals: dict[int, Refusal]) -> None:
        self.put(Piece((), [], refusals))

    async def next(self) -> list[Piece]:
        """What has come since the last time, once there is something."""
        await self.news.wait()
        self.news.clear()
        pieces, self.pieces = self.pieces, []
        return pieces


@dataclass(eq=False, slots=True)
class Waiting:
    """One item of a call that has not been answered."""

    item: Any
    tokens: int
    """That its next step reads, where the engine works in steps."""
    deadline: float
    """On the clock of time.monotonic."""
    call: Call
    place: int
    number: int
    followed: bool = False
    taken_back: bool = False
    """Nobody waits for it any more, though somebody may for others of its call."""

    def is_wanted(self, now: float) -> bool:
        """Does anybody wait for it, and had it begun by its deadline?"""
        return not (self.call.gone or self.taken_back or self.deadline < now)
