"""How many padded tokens a batch may hold: up to what memory allows, and only while larger batches are faster."""

from __future__ import annotations

import math

from deployments.memory import Memory

GIB = 2**30
LOW_MEMORY = ((1 * GIB, 1 / 4), (2 * GIB, 1 / 2))
"""(free bytes, fraction of `max_tokens`): a whole device with less free memory than this is limited to the fraction. A
share of a GPU is not: it may be smaller, and still be sized for the maximum, so only measured use limits it."""
MEMORY_FRACTION = 0.8
"""Fraction of the free memory that one batch may use. The rest is for fragmentation and other users of the device."""

FIRST_ON_CPU = 2048
"""Initial budget on a CPU, past the knee of most models. Larger batches are tried step by step, because the process
keeps the memory that a batch has allocated."""
SMALLEST = 64
"""Measurements never reduce the budget below this."""
NEARLY_BEST = 0.97
"""The smallest size whose throughput is at least this fraction of the best measured one is used."""
PROBE_EVERY = 16
"""One in this many full batches is tried at twice the size."""
WEIGHT = 0.2
"""Weight of the newest batch in the measured throughput of its size."""
REGROW = 1.02
"""After running out of memory, the ceiling grows by this factor per batch that fits, up to NEARLY_FAILED."""
NEARLY_FAILED = 0.9
"""Largest ceiling, as a fraction of the size that did not fit."""
FORGIVE = 1.001
"""The size that did not fit is raised by this factor per batch, so that it is tried again after about a thousand."""


class Budget:
    """The size of the next batch in padded tokens, between one item and `max_tokens`.

    Batches are grouped by size in powers of two. Throughput rises with batch size up to a knee that depends on the
    model and the machine. The budget starts at the maximum, or at FIRST_ON_CPU on a CPU, and follows the knee as
    batches of different sizes are measured. Memory is an upper bound: free bytes over measured bytes per token.
    """

    def __init__(self, max_tokens: int, memory: Memory) -> None:
        self.max_tokens = max_tokens
        self.memory = memory
        self.bytes_per_token = 0.0
        self._ceiling = float(max_tokens)
        """Upper bound after running out of memory."""
        self._did_not_fit = math.inf
        """Tokens of the smallest batch that ran out of memory, slowly forgiven."""
        self._rates: dict[int, float] = {}
        """Tokens per second, by the exponent of the batch's size."""
        self._full = 0
        """Batches so far that were full."""

    def tokens(self) -> int:
        """Padded tokens that the next batch may hold. A single item may always run."""
        return max(1, min(self._knee(), int(self._ceiling), self._memory_tokens()))

    def observe(self, tokens: int, seconds: float, full: bool) -> None:
        """Record that a batch of this many padded tokens has run. `full`: more items were waiting than fitted."""
        size = _size(tokens)
        rate = tokens / max(seconds, 1e-6)
        self._rates[size] = self._rates.get(size, rate) * (1 - WEIGHT) + rate * WEIGHT
        self._full += full
        self._did_not_fit *= FORGIVE
        regrown = max(self._ceiling, NEARLY_FAILED * self._did_not_fit)
        self._ceiling = min(self.max_tokens, self._ceiling * REGROW, regrown)
        if self.memory.free_bytes() is not None:
            self.bytes_per_token = max(self.bytes_per_token * 0.99, self.memory.batch_bytes() / tokens)

    def out_of_memory(self, tokens: int) -> None:
        """Record that a batch of this many padded tokens ran out of memory."""
        self._did_not_fit = min(self._did_not_fit, tokens)
        self._ceiling = max(1.0, min(self._ceiling, tokens / 2))

    def _knee(self) -> int:
        if not self._rates:
            return self.max_tokens if self.memory.free_bytes() is not None else min(self.max_tokens, FIRST_ON_CPU)
        best = max(self._rates.values())
        knee = min(size for size, rate in self._rates.items() if rate >= NEARLY_BEST * best)
        largest = max(self._rates)
        if knee == largest or self._full % PROBE_EVERY == PROBE_EVERY - 1:
            knee += 1
        return int(min(self.max_tokens, max(SMALLEST, 2**knee)))

    def _memory_tokens(self) -> int:
        free = self.memory.free_bytes()
        if free is None:
            return self.max_tokens
        low = () if self.memory.is_share else LOW_MEMORY
        allowed = self.max_tokens * next((fraction for below, fraction in low if free < below), 1.0)
        if self.bytes_per_token:
            allowed = min(allowed, MEMORY_FRACTION * free / self.bytes_per_token)
        return int(allowed)


def _size(tokens: int) -> int:
    """Exponent of the smallest power of two that holds this many tokens."""
    return max(0, math.ceil(math.log2(max(1, tokens))))
