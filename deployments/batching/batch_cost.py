"""What a batch costs, and whether waiting for a fuller one pays. Both are learned from recent measurements."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

FORGET = 0.95
"""Each new batch multiplies the weight of all older ones by this, so roughly the last twenty count."""
OUTLIER = 4.0
"""A batch's time is capped at this multiple of the expected time. More must be due to other load on the machine."""


class BatchCost:
    """Models a batch's time in seconds as `fixed + per_token * padded tokens`, by least squares over recent batches."""

    def __init__(self) -> None:
        self.fixed = 0.0
        self.per_token = 0.0
        self._sums = [0.0] * 5
        """Sums of 1, x, y, xx, xy over batches of x tokens that took y seconds, weighted by age."""

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
        elif self.fixed + self.per_token * tokens > 0:  # all of one size: keep the ratio, scale both terms
            level = (y / count) / self.seconds(x / count)
            self.fixed, self.per_token = self.fixed * level, self.per_token * level
        else:
            self.fixed = y / count

    def seconds(self, tokens: float) -> float:
        """Expected time of a batch of this many padded tokens. 0 before the first measurement."""
        return self.fixed + self.per_token * tokens

    @property
    def overhead_tokens(self) -> float:
        """Tokens that cost as much as starting a batch. Infinite if a token's cost is too small to measure."""
        return self.fixed / self.per_token if self.per_token > 0 else math.inf


SHORTEST_S = 1e-4
"""Shortest wait that an event loop can distinguish from none."""
NEARLY_ALL = 0.9
"""Fraction of the answered clients whose return counts as that of nearly all."""


class Linger:
    """Decides how long to wait after a batch for the clients it answered to return, so that they join the next batch.

    Without this, clients in a closed loop fall into batches of 31, 1, 31, 1. Arrival times of new items are recorded
    after every batch, whether or not the batcher waited for them. The gain of waiting is therefore known before it is
    tried. If waiting would slow things down (a lone client, clients that do not return), there is no wait.
    """

    LONGEST = 0.25
    """Longest wait, as a fraction of the last batch's time."""
    STEPS = 10
    """Steps into which the time up to the longest wait is divided."""
    WEIGHT = 0.2
    """Weight of the newest batch in what is learned."""

    def __init__(self, cost: BatchCost, clock: Callable[[], float] = time.monotonic) -> None:
        self.cost = cost
        self.clock = clock
        self.answered = 0
        """Items of the last batch."""
        self._ended = 0.0
        """When it ended, on `clock`."""
        self._step = 0.0
        """Seconds of a step; 0 before the first batch."""
        self._arrivals = [0] * self.STEPS
        """Items that have arrived since the last batch, by step."""
        self._back = [0.0] * self.STEPS
        """Fraction of the answered clients that are usually back by the end of each step."""

    @property
    def back_s(self) -> float:
        """Seconds after a batch until nearly all answered clients are back. Infinite if they do not return in time."""
        steps = (step * self._step for step, back in enumerate(self._back, 1) if back >= NEARLY_ALL)
        return next(steps, math.inf)

    def ended(self, items: int, seconds: float) -> None:
        """Record that a batch of `items` was answered after `seconds` on the engine."""
        self._learn()
        self.answered, self._ended = items, self.clock()
        self._step = seconds * self.LONGEST / self.STEPS
        self._arrivals = [0] * self.STEPS

    def arrived(self, items: int) -> None:
        """Record the arrival of this many new items."""
        if self._step:
            step = int((self.clock() - self._ended) / self._step)
            if step < self.STEPS:
                self._arrivals[step] += items

    def wait_s(self, waiting: int, tokens: int, room: int) -> float:
        """Seconds to wait from now. `waiting` items of `tokens` in total are queued; the batch holds `room` items."""
        arrived = sum(self._arrivals)
        if not waiting or waiting >= room or arrived >= self.answered or not self._step:
            return 0.0
        since_s = self.clock() - self._ended
        tokens_each = tokens / waiting
        best_rate, best_s = waiting / max(self.cost.seconds(tokens), 1e-6), 0.0
        for step, back in enumerate(self._back, 1):
            wait_s = step * self._step - since_s
            more = back * self.answered - arrived
            if wait_s > SHORTEST_S and more > 0:
                items = min(room, waiting + more)
                rate = items / (wait_s + self.cost.seconds(items * tokens_each))
                if rate > best_rate:
                    best_rate, best_s = rate, wait_s
        return best_s

    def _learn(self) -> None:
        if not self._step:
            return
        arrived = 0
        for step, items in enumerate(self._arrivals):
            arrived += items
            back = min(1.0, arrived / self.answered)
            self._back[step] += self.WEIGHT * (back - self._back[step])
