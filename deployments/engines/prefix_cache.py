"""Keeps what was read of earlier prompts, for later ones with the same beginning: people type on."""

from __future__ import annotations

from collections import OrderedDict

from deployments.engines.sequences import Sequence

SHORTEST = 8
"""Fewest tokens that prompts must share. Reading fewer is as fast as looking them up and copying them."""

Ids = tuple[int, ...]
Key = tuple[str, Ids]
"""Tenant and tokens of a prompt. Tenants share nothing, so response times don't reveal what another tenant asked."""


class Prefixes:
    """The prompts read most recently, within `max_bytes`. The least recently used prompt is evicted first.

    A token of KoGPT2 takes 72 kB on a CPU and half of that on a GPU; one of LLaVA 1.5 7b takes 1 MB and 512 kB.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._kept: OrderedDict[Key, Sequence] = OrderedDict()
        self._by_start: dict[Key, set[Key]] = {}

    def sequence(self, tenant: str, ids: list[int]) -> Sequence:
        """A sequence that has read the longest prefix of `ids` that is cached for the tenant.

        At least the last id is left to read.
        """
        best, shared = None, SHORTEST - 1
        for other in self._by_start.get((tenant, tuple(ids[:SHORTEST])), ()):
            common = _common(ids, other[1])
            if common > shared:
                best, shared = other, common
        shared = min(shared, len(ids) - 1)
        if best is None or shared < SHORTEST:
            return Sequence()
        self._kept.move_to_end(best)
        return self._kept[best].copy_of_first(shared)

    def keep(self, tenant: str, ids: list[int], sequence: Sequence) -> None:
        """Cache the tenant's prompt `ids`, which are the first tokens of `sequence`."""
        key = (tenant, tuple(ids))
        if len(ids) < SHORTEST or sequence.nbytes(len(ids)) > self.max_bytes:
            return
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        try:
            kept = sequence.copy_of_first(len(ids))
        except (RuntimeError, MemoryError):  # out of memory, and the cache is optional
            self.clear()
            return
        self._put(key, kept)

    def give(self, tenant: str, ids: list[int], sequence: Sequence) -> None:
        """As `keep`, but without a copy, of a sequence that has read just `ids` and that nobody uses any more.

        It takes the place of what is cached of its own beginning.
        """
        key = (tenant, tuple(ids))
        if len(ids) < SHORTEST or sequence.allocated > self.max_bytes:
            return
        for other in [*self._by_start.get(_start(key), ())]:
            if key[1][: len(other[1])] == other[1]:
                self._drop(other)
        self._put(key, sequence)

    def _put(self, key: Key, sequence: Sequence) -> None:
        self._kept[key] = sequence
        self._by_start.setdefault(_start(key), set()).add(key)
        self.nbytes += sequence.allocated
        while self.nbytes > self.max_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: Key) -> None:
        self.nbytes -= self._kept.pop(key).allocated
        alike = self._by_start[_start(key)]
        alike.discard(key)
        if not alike:
            del self._by_start[_start(key)]

    def clear(self) -> None:
        self._kept.clear()
        self._by_start.clear()
        self.nbytes = 0


def _start(key: Key) -> Key:
    return key[0], key[1][:SHORTEST]


def _common(ids: list[int], others: Ids) -> int:
    """Length of the common prefix."""
    for place, (one, other) in enumerate(zip(ids, others, strict=False)):
        if one != other:
            return place
    return min(len(ids), len(others))
