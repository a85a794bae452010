"""How many threads torch computes a batch with on a CPU: as many as pay, by what batches of like size took lately."""

from __future__ import annotations

import math
from collections import defaultdict

WORTH = 1.25
"""Twice the threads have to make a batch so many times as fast. A thread that adds less is worth more to another model,
or to the ingress."""
TRY_EVERY = 24
"""Of the batches of a size, so often one is run with another count: what else runs on the machine changes."""
WEIGHT = 0.25
"""Of a new measurement beside what was known."""


class ThreadChoice:
    """Chooses between 1, 2, 4 and so on up to `most` threads, for each power of two of a batch's tokens apart.

    Beside other processes on the same cores a batch on several threads waits at each layer for the one that was held
    up, so that more threads may be slower; alone on the machine they are faster, but for small batches.
    """

    def __init__(self, most: int) -> None:
        self.counts = [most, *(1 << power for power in reversed(range((most - 1).bit_length())))]
        """The most first: that is right for a model that is alone."""
        self._seconds: dict[tuple[int, int], float] = {}
        """For each token, by size and threads."""
        self._batches: defaultdict[int, int] = defaultdict(int)

    def choose(self, tokens: int) -> int:
        """Threads for a batch of so many tokens."""
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
        """A batch of so many tokens took so long with so many threads."""
        size, each = tokens.bit_length(), seconds / max(tokens, 1)
        known = self._seconds.get((size, threads), each)
        self._seconds[size, threads] = (1 - WEIGHT) * known + WEIGHT * each
        self._batches[size] += 1
