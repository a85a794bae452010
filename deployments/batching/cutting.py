"""Chooses which waiting items form the next batch."""

from __future__ import annotations

import math

ROUND = 8
"""If other items wait anyway, a batch that is not full is cut to a multiple of this, because each new shape may cost an
engine preparation."""


def cut(lengths: list[int], overhead_tokens: float, max_items: int, max_tokens: int) -> list[int]:
    """Indices of the items of the next batch. `lengths` are the waiting items' lengths, in order of arrival.

    Every item is padded to the longest of its batch, and starting a batch costs as much as `overhead_tokens`. The
    waiting items are divided into ranges of length that minimise overhead plus padding. The range that holds the oldest
    item is served, oldest first, so the oldest item never waits for more than the running batch.
    A batch holds at most `max_items` items and `max_tokens` padded tokens. A single item may be longer.
    """
    groups: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        groups.setdefault(_rounded(length), []).append(place)
    sizes = sorted(groups)
    counts = [len(groups[size]) for size in sizes]
    low, high = _range_of(sizes.index(_rounded(lengths[0])), sizes, counts, overhead_tokens, max_items, max_tokens)
    batch: list[int] = []
    longest = 0
    for place in sorted(place for size in sizes[low:high] for place in groups[size]):
        padded = max(longest, lengths[place])
        if not batch or padded * (len(batch) + 1) <= max_tokens:
            batch.append(place)
            longest = padded
            if len(batch) == max_items:
                break
    if ROUND < len(batch) < min(len(lengths), max_items):
        del batch[len(batch) // ROUND * ROUND :]
    return batch


def _range_of(
    wanted: int, sizes: list[int], counts: list[int], overhead: float, max_items: int, max_tokens: int
) -> tuple[int, int]:
    """The range of `sizes` that holds index `wanted`, in the cheapest division of all sizes into ranges."""
    if math.isinf(overhead):
        return 0, len(sizes)
    best = [0.0]
    starts = []
    for high in range(1, len(sizes) + 1):
        items = 0
        least, start = math.inf, 0
        for low in range(high - 1, -1, -1):
            items += counts[low]
            padded = items * sizes[high - 1]
            batches = math.ceil(max(items / max_items, padded / max_tokens))
            cost = best[low] + overhead * batches + padded
            if cost < least:
                least, start = cost, low
        best.append(least)
        starts.append(start)
    high = len(sizes)
    while starts[high - 1] > wanted:
        high = starts[high - 1]
    return starts[high - 1], high


def _rounded(length: int) -> int:
    """The length rounded up to three significant bits, so that there are few distinct sizes."""
    shift = max(0, length.bit_length() - 3)
    return -(-length >> shift) << shift
