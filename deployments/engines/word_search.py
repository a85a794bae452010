"""The search for a next word: candidates that grow in parallel after a shared prefix."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np

from deployments.engines.prefix_cache import Prefixes
from deployments.engines.sequences import Sequence, Turn
from deployments.messages import Prompt, Word


@dataclass(frozen=True)
class Prefix:
    """An item: the ids of the input's last tokens, and the prompt they are from."""

    ids: list[int]
    begins_word: bool
    """The input ended in a space, so only tokens that begin a word are candidates."""
    prompt: Prompt


@dataclass(eq=False)
class Candidate:
    """A word that grows token by token."""

    ids: list[int]
    confidence: float
    places: list[int] = field(default_factory=list)
    """Indices of its tokens in the search's sequence."""


class WordSearch:
    """The work on one item: candidates that grow in parallel, each seeing the prefix and its own tokens."""

    def __init__(self, item: Prefix) -> None:
        self.item = item
        self.sequence: Sequence | None = None
        self.candidates: list[Candidate] = []
        self.growing: list[Candidate] = []
        self.ended: dict[str, float] = {}
        """Confidence by text. If two candidates became the same word, the larger confidence."""
        self.result: list[Word] | None = None

    @property
    def cost(self) -> int:
        """Tokens that the next step reads."""
        return len(self.growing) or len(self.item.ids)

    @property
    def written(self) -> int:
        """Tokens of the longest candidate."""
        return max((len(candidate.ids) for candidate in self.candidates), default=0)

    def turn(self, prefixes: Prefixes) -> Turn:
        """What to read next: first the uncached part of the prefix, later the last token of each growing candidate."""
        if self.sequence is None:
            self.sequence = prefixes.sequence(self.item.prompt.tenant, self.item.ids)
        prefix, length = len(self.item.ids), self.sequence.length
        if not self.candidates:
            return Turn(self.sequence, self.item.ids[length:], list(range(length, prefix)))
        count = len(self.growing)
        visible = np.zeros((count, length + count), bool)
        visible[:, :prefix] = True
        for row, candidate in enumerate(self.growing):
            visible[row, candidate.places] = visible[row, length + row] = True
        at = prefix + len(self.growing[0].ids) - 1
        return Turn(self.sequence, [candidate.ids[-1] for candidate in self.growing], [at] * count, visible)

    def end(self, text: str, confidence: float) -> None:
        if text:
            self.ended[text] = max(self.ended.get(text, 0.0), confidence)

    def give_up_hopeless(self) -> None:
        """Drop candidates below the `top_k` best finished words. Confidences only fall, so they can't get back in."""
        if len(self.ended) >= self.item.prompt.top_k:
            bar = heapq.nlargest(self.item.prompt.top_k, self.ended.values())[-1]
            self.growing = [candidate for candidate in self.growing if candidate.confidence >= bar]
