"""What a batch costs, and whether waiting for a fuller one pays. Both are learned from recent measurements."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

FORGET = 0.95
"""Decay of older batches per new one. Roughly the last twenty batches count."""
OUTLIER = 4.0
"""A batch's time is capped at this multiple of the expected time. Beyond it, other load on the machine is the cause."""


class BatchCost:
    """Models a batch's time in seconds as `fixed + per_token * padded tokens`, by least squares over recent batches."""

    def __init__(self) -> None:
        self.fixed = 0.0
        self.per_token = 0.0
        self._sums = [0.0] * 5  # sums of 1, x, y, xx, xy; each batch is weighted by its age

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


class Linger:
    """Decides how long to wait after a batch for the clients it answered to return, so that they join the next batch.

    Without this, clients in a closed loop fall into batches of 31, 1, 31, 1. Arrival times of new items are recorded
    after every batch, whether or not the batcher waited for them. The gain of waiting is therefore known before it is
    tried. If waiting would slow things down (a lone client, clients that do not return), there is no wait.
    """

    LONGEST = 0.25
    """Longest wait, as a fraction of the last batch's time."""
    STEPS = 10
    WEIGHT = 0.2

    def __init__(self, cost: BatchCost, clock: Callable[[], float] = time.monotonic) -> None:
        self.cost = cost
        self.clock = clock
        self.answered = 0
        self._ended = self._step = 0.0
        self._arrivals = [0] * self.STEPS
        self._share = [0.0] * self.STEPS  # fraction of the answered clients back by the end of each step

    @property
    def back_s(self) -> float:
        """Seconds after a batch until nearly all answered clients are back. Infinite if they do not return in time."""
        steps = (step * self._step for step, share in enumerate(self._share, 1) if share >= NEARLY_ALL)
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
        back = sum(self._arrivals)
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
        for step, items in enumerate(self._arrivals):
            came += items
            share = min(1.0, came / self.answered)
            self._share[step] += self.WEIGHT * (share - self._share[step])
