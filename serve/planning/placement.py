"""Places replicas on GPUs by the shares that they book, as Ray does. Anything else on the machine is ignored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

TOLERANCE = 1e-9
"""Rounding error allowed in sums of fractions: 0.33 + 0.56 + 0.11 is more than 1 in floating point."""


@dataclass(frozen=True)
class Booking:
    """What each replica of a model books."""

    model: str
    replicas: int
    booked: float
    """Share of a GPU, or a number of GPUs."""
    worked_out: bool = field(default=False, kw_only=True)
    """The config gives no share, and `booked` is the smallest that is enough."""

    @property
    def gpus(self) -> int:
        """GPUs that each replica is on: one that it shares, or several whole ones, as Ray does not split those."""
        return 1 if self.worked_out else max(1, math.ceil(self.booked - TOLERANCE))

    @property
    def on_each(self) -> float:
        """The share that it books on each of its GPUs."""
        return 1 if self.gpus > 1 else self.booked


@dataclass
class Gpu:
    number: int
    memory_bytes: float = 0
    """0 if only shares count."""
    replicas: list[Booking] = field(default_factory=list)

    @property
    def free(self) -> float:
        """The share that nobody has booked."""
        return 1 - sum(booking.on_each for booking in self.replicas)


def place(bookings: Iterable[Booking], gpus: list[Gpu]) -> Iterator[tuple[Booking, int]]:
    """Place the replicas, largest first, each on the fullest GPU with room; one that books several takes empty ones.

    Yields the booking and the replica's number, from 1, for each replica that has no place.
    """
    for booking in sorted(bookings, key=lambda booking: -booking.booked):
        for number in range(1, booking.replicas + 1):
            fitting = [gpu for gpu in gpus if gpu.free >= booking.on_each - TOLERANCE]
            if len(fitting) < booking.gpus:
                yield booking, number
                continue
            for gpu in sorted(fitting, key=lambda gpu: gpu.free)[: booking.gpus]:
                gpu.replicas.append(booking)
