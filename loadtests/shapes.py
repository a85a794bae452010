"""How many people there are over time. A shape is a line through points (share of its time, share of the peak)."""

from __future__ import annotations

from itertools import pairwise

Line = tuple[tuple[float, float], ...]

FEWEST = 2
"""People at any time: at least one who watches and one who works."""

SHAPES: dict[str, Line] = {
    # People come in the morning, half of them go to lunch, and the evening ends slowly.
    "day": ((0, 0.1), (0.2, 1), (0.42, 1), (0.48, 0.5), (0.54, 0.5), (0.6, 1), (0.8, 1), (0.85, 0.4), (1, 0.1)),
    # Somebody has sent everyone a link.
    "spike": ((0, 0.2), (0.3, 0.2), (0.32, 1), (0.6, 1), (0.62, 0.2), (1, 0.2)),
    # The same load for hours, to find what leaks or fills up.
    "soak": ((0, 0.1), (0.05, 0.7), (0.95, 0.7), (1, 0.1)),
    # Four times a day's peak; afterwards it shows how soon the queues are short again.
    "overload": ((0, 0.5), (0.1, 1), (0.3, 4), (0.75, 4), (0.77, 0.5), (1, 0.5)),
}


def people(shape: str, peak: int, elapsed: float) -> int:
    """The number of people after the share `elapsed` of the time (0 to 1), where `peak` is a day's peak."""
    line = SHAPES[shape]
    (since, before), (until, after) = next(
        (ends for ends in pairwise(line) if elapsed <= ends[1][0]), (line[-2], line[-1])
    )
    share = before + (after - before) * min((elapsed - since) / (until - since), 1)
    return max(FEWEST, round(share * peak))
