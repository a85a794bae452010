"""What a batch costs and whether waiting for a fuller one pays, both from what was measured lately."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

FORGET = 0.95
"""Weight of what was known before each new batch: the last twenty or so count."""
OUTLIER = 4.0
"""A batch that took this many times what was expected says more about its neighbours on the machine than about it."""


class BatchCost:
    """Seconds of a batch as `fixed + per_token * tokens` (padded tokens): least squares over recent batches."""

    def __init__(self) -> None:
        self.fixed = 0.0
        self.per_token = 0.0
        self._sums = [0.0] * 5  # of 1, x, y, xx, xy, each batch weighted by its age

    def observe(self, tokens: int, seconds: float) -> None:
        if self._sums[0] >= 1:
            seconds = min(seconds, OUTLIER * max(self.seconds(tokens), 1e-4))
        new = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        self._sums = [FORGET * old + term for old, term in zip(self._sums, new, strict=True)]
        count, x, y, xx, xy = self._sums
        spread = count * xx - x * x
        if spread > 0.01 * x * x:
            slope = max(0.0, (count * xy - x * y) / spread)
            self.per_token = min(slope, y / x)
            self.fixed = (y - self.per_token * x) / count
        elif self.fixed + self.per_token * tokens > 0:  # all of one size: keep the shares, follow the level
            level = (y / count) / self.seconds(x / count)
            self.fixed, self.per_token = self.fixed * level, self.per_token * level
        else:
            self.fixed = y / count

    def seconds(self, tokens: float) -> float:
        """Expected time of a batch of so many padded tokens; 0 before the first was measured."""
        return self.fixed + self.per_token * tokens

    @property
    def overhead_tokens(self) -> float:
        """How many tokens cost as much as starting a batch does; infinite where tokens cost nothing measurable."""
        return self.fixed / self.per_token if self.per_token > 0 else math.inf


SHORTEST_S = 1e-4
"""A wait that an event loop can still tell from none."""
NEARLY_ALL = 0.9


class Linger:
    """How long to wait after a batch for those that it answered to come back, so that they join the next one.

    Closed loops of clients otherwise fall into batches of 31, 1, 31, 1. After each batch it is noted when new items
    came, whether anybody waited for them or not. So the gain of waiting is known before it is tried, and where it
    would slow things down (a lone client, clients that stay away) nothing waits.
    """

    LONGEST = 0.25
    """Of the time of a batch."""
    STEPS = 10
    WEIGHT = 0.2

    def __init__(self, cost: BatchCost, clock: Callable[[], float] = time.monotonic) -> None:
        self.cost = cost
        self.clock = clock
        self.answered = 0
        self._ended = self._step = 0.0
        self._came = [0] * self.STEPS
        self._share = [0.0] * self.STEPS  # of the answered, back by the end of each step

    @property
    def back_s(self) -> float:
        """How long after a batch nearly all that it answered have come back; infinite where they don't in time."""
        steps = (step * self._step for step, share in enumerate(self._share, 1) if share >= NEARLY_ALL)
        return next(steps, math.inf)

    def ended(self, items: int, seconds: float) -> None:
        """A batch of so many items has been answered after so many seconds on the engine."""
        self._learn()
        self.answered, self._ended = items, self.clock()
        self._step = seconds * self.LONGEST / self.STEPS
        self._came = [0] * self.STEPS

    def arrived(self, items: int) -> None:
        """So many new items have come."""
        if self._step:
            step = int((self.clock() - self._ended) / self._step)
            if step < self.STEPS:
                self._came[step] += items

    def wait_s(self, waiting: int, tokens: int, room: int) -> float:
        """How long from now to wait with `waiting` items of `tokens` in hand and room for `room` in the batch."""
        back = sum(self._came)
        if not waiting or waiting >= room or back >= self.answered or not self._step:
            return 0.0
        since = self.clock() - self._ended
        each = tokens / waiting
        best_rate, best_s = waiting / max(self.cost.seconds(tokens), 1e-6), 0.0
        for step, share in enumerate(self._share, 1):
            wait = step * self._step - since
            more = share * self.answered - back
            if wait > SHORTEST_S and more > 0:
                full = min(room, waiting + more)
                rate = full / (wait + self.cost.seconds(full * each))
                if rate > best_rate:
                    best_rate, best_s = rate, wait
        return best_s

    def _learn(self) -> None:
        if not self._step:
            return
        came = 0
        for step, items in enumerate(self._came):
            came += items
            share = min(1.0, came / self.answered)
            self._share[step] += self.WEIGHT * (share - self._share[step])
