"""How fast a queue moves."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque

PACE_OF_S, PACE_OF_ITEMS = 30.0, 10
"""The pace is that of the last so many seconds of work, or items where these take longer. One that follows every batch
is at times too fast, and then too many tickets are given for the same second."""
KEPT_TIMES = 101


class Pace:
    """How fast a queue goes, measured at its end."""

    def __init__(self) -> None:
        self.seconds_per_item = 0.05
        self._worked_s = self._items = 0.0
        """What is over, the more the longer ago the less."""
        self._times: deque[float] = deque(maxlen=KEPT_TIMES)
        self._last = 0.0

    def served(self, items: int, started: float) -> None:
        """What `started` then (time.monotonic) is over: what it took beside those before it counts."""
        now = time.monotonic()
        worked_s = now - max(started, self._last)
        self._last = now
        kept = math.exp(-worked_s / max(PACE_OF_S, PACE_OF_ITEMS * self.seconds_per_item))
        self._worked_s = kept * self._worked_s + worked_s
        self._items = kept * self._items + items
        self.seconds_per_item = self._worked_s / self._items
        self._times.append(now - started)

    def unserved(self, items: int, started: float) -> None:
        """So many run, the first since `started` (time.monotonic): were they all over now, it would be no faster."""
        since_s = time.monotonic() - max(started, self._last)
        self.seconds_per_item = max(self.seconds_per_item, (self._worked_s + since_s) / (self._items + items))

    @property
    def p50_s(self) -> float | None:
        """Median of the last service times."""
        return statistics.median(self._times) if self._times else None
