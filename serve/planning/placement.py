"""Which GPUs replicas go on, by the shares that they book: as Ray divides GPUs, whatever else is on the machine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

TOLERANCE = 1e-9
"""Of sums of fractions: 0.33 + 0.56 + 0.11 is more than 1."""


@dataclass(frozen=True)
class Booking:
    """What each of a model's replicas books."""

    model: str
    replicas: int
    booked: float
    """Share of a GPU, or how many of them."""
    worked_out: bool = field(default=False, kw_only=True)
    """The config leaves it out: `booked` is the least that will do."""

    @property
    def gpus(self) -> int:
        """That each replica is on: one of which it has a share, or several, which Ray gives only whole."""
        return 1 if self.worked_out else max(1, math.ceil(self.booked - TOLERANCE))

    @property
    def on_each(self) -> float:
        """The share that it books of each of them."""
        return 1 if self.gpus > 1 else self.booked


@dataclass
class Gpu:
    number: int
    memory_bytes: float = 0
    """0 where only shares count."""
    replicas: list[Booking] = field(default_factory=list)

    @property
    def free(self) -> float:
        """The share that nobody has booked."""
        return 1 - sum(booking.on_each for booking in self.replicas)


def place(bookings: Iterable[Booking], gpus: list[Gpu]) -> Iterator[tuple[Booking, int]]:
    """Put the largest replicas first, each where the least is left that will do, and one that books several GPUs on
    empty ones. Yields a replica and its number, from 1, when it turns out to have no place.
    """
    for booking in sorted(bookings, key=lambda booking: -booking.booked):
        for number in range(1, booking.replicas + 1):
            fitting = [gpu for gpu in gpus if gpu.free >= booking.on_each - TOLERANCE]
            if len(fitting) < booking.gpus:
                yield booking, number
                continue
            for gpu in sorted(fitting, key=lambda gpu: gpu.free)[: booking.gpus]:
                gpu.replicas.append(booking)
