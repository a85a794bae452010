"""The speed of a queue."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque

PACE_OF_S, PACE_OF_ITEMS = 30.0, 10
"""The pace covers the last 30 seconds of work, or the last 10 items if these take longer. A pace that followed every
batch would at times be too fast, and then too many tickets would be given for the same second."""
KEPT_TIMES = 101


class Pace:
    """The speed of a queue, measured where work finishes."""

    def __init__(self) -> None:
        self.seconds_per_item = 0.05
        self._worked_s = self._items = 0.0
        """Finished work; older work weighs less."""
        self._times: deque[float] = deque(maxlen=KEPT_TIMES)
        self._last = 0.0

    def served(self, items: int, started: float) -> None:
        """Record `items` that began at `started` (time.monotonic) and are done. Time already counted is left out."""
        now = time.monotonic()
        worked_s = now - max(started, self._last)
        self._last = now
        kept = math.exp(-worked_s / max(PACE_OF_S, PACE_OF_ITEMS * self.seconds_per_item))
        self._worked_s = kept * self._worked_s + worked_s
        self._items = kept * self._items + items
        self.seconds_per_item = self._worked_s / self._items
        self._times.append(now - started)

    def unserved(self, items: int, started: float) -> None:
        """Slow the pace to what it would be if `items` running since `started` (time.monotonic) finished now."""
        since_s = time.monotonic() - max(started, self._last)
        self.seconds_per_item = max(self.seconds_per_item, (self._worked_s + since_s) / (self._items + items))

    @property
    def p50_s(self) -> float | None:
        """Median of recent service times."""
        return statistics.median(self._times) if self._times else None
