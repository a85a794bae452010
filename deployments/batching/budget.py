"""How many padded tokens a batch may hold: as many as memory allows, and no more than make it faster."""

from __future__ import annotations

import math

from deployments.memory import Memory

GIB = 2**30
LOW_MEMORY = ((1 * GIB, 1 / 4), (2 * GIB, 1 / 2))
"""Under so many free bytes of a whole device, this share of the maximum. A share of a GPU may be smaller than that and
still be made for the maximum, so there only what was measured counts."""
MEMORY_SHARE = 0.8
"""Of the free memory that one batch may take: the rest is for fragments and for others on the same device."""

FIRST_ON_CPU = 2048
"""Past the knee of most models on a CPU; from there on larger batches are tried step by step, as what a batch takes is
kept by the process for the next one."""
SMALLEST = 64
NEARLY_BEST = 0.97
"""The smallest size whose throughput comes this near to the best measured is the size to run."""
PROBE_EVERY = 16
"""Of the full batches, so often one of twice the size is tried."""
WEIGHT = 0.2
REGROW = 1.02
"""Per batch that fitted, after memory ran out, up to nearly what did not fit."""
NEARLY_FAILED = 0.9
FORGIVE = 1.001
"""Per batch: what once did not fit is tried again some thousand batches later."""


class Budget:
    """The size of the next batch in padded tokens, between one item and `max_tokens`.

    Sizes are told apart by powers of two. Throughput rises with the size of a batch up to a knee that depends on
    model and machine: the budget starts at the maximum, or on a CPU at FIRST_ON_CPU, and follows the knee as batches of
    different sizes are measured. Memory bounds it from above: free bytes over the bytes per token measured so far.
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
        """Padded tokens that the next batch may hold; a single item may always run."""
        return max(1, min(self._knee(), int(self._ceiling), self._memory_tokens()))

    def observe(self, tokens: int, seconds: float, full: bool) -> None:
        """A batch of so many padded tokens has run; `full` where more waited than fitted in."""
        size = _size(tokens)
        rate = tokens / max(seconds, 1e-6)
        self._rates[size] = self._rates.get(size, rate) * (1 - WEIGHT) + rate * WEIGHT
        self._full += full
        self._failed *= FORGIVE
        self._ceiling = min(self.max_tokens, self._ceiling * REGROW, max(self._ceiling, NEARLY_FAILED * self._failed))
        if self.memory.free_bytes() is not None:
            self.bytes_per_token = max(self.bytes_per_token * 0.99, self.memory.batch_bytes() / tokens)

    def out_of_memory(self, tokens: int) -> None:
        """A batch of so many padded tokens did not fit."""
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
    """The power of two that holds so many tokens."""
    return max(0, math.ceil(math.log2(max(1, tokens))))
