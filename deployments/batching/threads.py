"""Chooses how many CPU threads torch uses for a batch, from the recent times of batches of similar size."""

from __future__ import annotations

import math
from collections import defaultdict

WORTH = 1.25
"""Doubling the threads must make a batch at least this many times as fast. Threads that add less are worth more to
another model or the ingress."""
TRY_EVERY = 24
"""One in this many batches of a size is run with another count, because the other load on the machine changes."""
WEIGHT = 0.25
"""Weight of a new measurement in the moving average."""


class ThreadChoice:
    """Chooses 1, 2, 4 and so on up to `most` threads, separately for each power of two of a batch's tokens.

    If other processes use the same cores, a batch on several threads waits at each layer for the slowest thread, so
    more threads may be slower. Alone on the machine, more threads are faster except for small batches.
    """

    def __init__(self, most: int) -> None:
        self.counts = [most, *(1 << power for power in reversed(range((most - 1).bit_length())))]
        """Largest count first: it is best for a model that runs alone."""
        self._seconds: dict[tuple[int, int], float] = {}
        """Seconds per token, by batch size and thread count."""
        self._batches: defaultdict[int, int] = defaultdict(int)

    def choose(self, tokens: int) -> int:
        """Thread count for a batch of this many tokens."""
        size = tokens.bit_length()
        untried = [count for count in self.counts if (size, count) not in self._seconds]
        if untried:
            return untried[0]
        batches = self._batches[size]
        if batches % TRY_EVERY == 0:
            return self.counts[batches // TRY_EVERY % len(self.counts)]
        best = 1
        for count in reversed(self.counts):
            if self._seconds[size, best] >= WORTH ** math.log2(count / best) * self._seconds[size, count]:
                best = count
        return best

    def observe(self, tokens: int, threads: int, seconds: float) -> None:
        """Record the time that a batch of this many tokens took."""
        size, each = tokens.bit_length(), seconds / max(tokens, 1)
        known = self._seconds.get((size, threads), each)
        self._seconds[size, threads] = (1 - WEIGHT) * known + WEIGHT * each
        self._batches[size] += 1
