"""How many padded tokens a batch may hold: up to what memory allows, and only while larger batches are faster."""

from __future__ import annotations

import math

from deployments.memory import Memory

GIB = 2**30
LOW_MEMORY = ((1 * GIB, 1 / 4), (2 * GIB, 1 / 2))
"""(free bytes, fraction of the maximum): limits for a whole device with less free memory than this. They do not apply
to a share of a GPU, which may be smaller and still be sized for the maximum. There only measurements count."""
MEMORY_SHARE = 0.8
"""Fraction of the free memory that one batch may use. The rest is for fragmentation and other users of the device."""

FIRST_ON_CPU = 2048
"""Initial budget on a CPU, past the knee of most models. Larger batches are tried step by step, because the process
keeps the memory that a batch has allocated."""
SMALLEST = 64
NEARLY_BEST = 0.97
"""The smallest size whose throughput is at least this fraction of the best measured one is used."""
PROBE_EVERY = 16
"""One in this many full batches is tried at twice the size."""
WEIGHT = 0.2
REGROW = 1.02
"""After running out of memory, the ceiling grows by this factor per batch that fits, up to NEARLY_FAILED."""
NEARLY_FAILED = 0.9
"""Largest ceiling, as a fraction of the size that did not fit."""
FORGIVE = 1.001
"""The size that did not fit grows by this factor per batch, so it is tried again about a thousand batches later."""


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
        self._failed = math.inf
        self._rates: dict[int, float] = {}
        self._full = 0

    def tokens(self) -> int:
        """Padded tokens that the next batch may hold. A single item may always run."""
        return max(1, min(self._knee(), int(self._ceiling), self._memory_tokens()))

    def observe(self, tokens: int, seconds: float, full: bool) -> None:
        """Record that a batch of this many padded tokens has run. `full`: more items waited than fitted in."""
        size = _size(tokens)
        rate = tokens / max(seconds, 1e-6)
        self._rates[size] = self._rates.get(size, rate) * (1 - WEIGHT) + rate * WEIGHT
        self._full += full
        self._failed *= FORGIVE
        self._ceiling = min(self.max_tokens, self._ceiling * REGROW, max(self._ceiling, NEARLY_FAILED * self._failed))
        if self.memory.free_bytes() is not None:
            self.bytes_per_token = max(self.bytes_per_token * 0.99, self.memory.batch_bytes() / tokens)

    def out_of_memory(self, tokens: int) -> None:
        """Record that a batch of this many padded tokens ran out of memory."""
        self._failed = min(self._failed, tokens)
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
        allowed = self.max_tokens * next((share for under, share in low if free < under), 1.0)
        if self.bytes_per_token:
            allowed = min(allowed, MEMORY_SHARE * free / self.bytes_per_token)
        return int(allowed)


def _size(tokens: int) -> int:
    """Exponent of the smallest power of two that holds this many tokens."""
    return max(0, math.ceil(math.log2(max(1, tokens))))
