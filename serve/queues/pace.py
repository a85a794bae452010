"""The speed of a queue."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque

PACE_OF_S, PACE_OF_TURNS = 30.0, 10
"""The pace covers the last 30 seconds of work, or the last 10 turns if these take longer. A pace that followed every
batch would at times be too fast, and then too many tickets would be given for the same second."""
KEPT_TIMES = 101
"""Service times that the median is taken of."""


class Pace:
    """The speed of a queue in seconds per turn, measured as work finishes."""

    def __init__(self) -> None:
        self.seconds_per_turn = 0.05
        self._worked_s = self._turns = 0.0
        """Finished work; older work weighs less."""
        self._times: deque[float] = deque(maxlen=KEPT_TIMES)
        self._last = 0.0
        """When work last finished (time.monotonic)."""

    def served(self, turns: int, started: float) -> None:
        """Record that `turns` begun at `started` (time.monotonic) are done. Time already counted is left out."""
        now = time.monotonic()
        worked_s = now - max(started, self._last)
        self._last = now
        kept = math.exp(-worked_s / max(PACE_OF_S, PACE_OF_TURNS * self.seconds_per_turn))
        self._worked_s = kept * self._worked_s + worked_s
        self._turns = kept * self._turns + turns
        self.seconds_per_turn = self._worked_s / self._turns
        self._times.append(now - started)

    def unserved(self, turns: int, started: float) -> None:
        """Slow the pace to what it would be if `turns` running since `started` (time.monotonic) finished now."""
        since_s = time.monotonic() - max(started, self._last)
        self.seconds_per_turn = max(self.seconds_per_turn, (self._worked_s + since_s) / (self._turns + turns))

    @property
    def p50_s(self) -> float | None:
        """Median of recent service times."""
        return statistics.median(self._times) if self._times else None
