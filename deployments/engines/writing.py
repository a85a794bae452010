"""An answer that is written token by token under a grammar, so that even a bad model answers in it.

Where the grammar leaves no choice, which in JSON is most of the time, its tokens are read along with the next one that
the model chooses, and take no step of their own.
"""

from __future__ import annotations

import numpy as np
import torch
from llguidance import LLMatcher

from deployments.engines.sequences import Sequence


class Writing:
    """One answer on its way."""

    def __init__(self, sequence: Sequence, matcher: LLMatcher, eos: int) -> None:
        self.sequence = sequence
        self.matcher = matcher
        self.eos = eos
        self.written: list[int] = []
        self.forced = 0
        """Of the tokens written, those that the grammar did not leave to the model."""
        self.to_read: list[int] = []
        """Of the tokens written, those that the model has not read."""
        self.ended = False
        if matcher.is_error():
            raise RuntimeError(f"the schema makes no grammar: {matcher.get_error()}")
        self._force()

    def write(self, token: int) -> None:
        """The model has chosen this token; appends what must follow."""
        self.to_read = []
        if self.ended:  # the grammar had left nothing to choose
            return
        self._append([token])
        self._force()

    def _force(self) -> None:
        if not self.ended:
            tokens = self.matcher.compute_ff_tokens()
            self.forced += len(tokens)
            self._append(tokens)

    def _append(self, tokens: list[int]) -> None:
        if tokens:
            self.matcher.consume_tokens(tokens)  # a grammar in trouble stops
        self.ended = self.matcher.is_stopped() or self.eos in tokens
        tokens = [token for token in tokens if token != self.eos]
        self.written += tokens
        self.to_read += tokens


def choose(logits: torch.Tensor, writings: list[Writing]) -> list[int]:
    """For each answer the likeliest of the tokens that may follow; `logits` has shape (answers, vocabulary)."""
    allowed = np.zeros(logits.shape, dtype=bool)
    for row, writing in enumerate(writings):
        if writing.ended:
            continue
        bits = np.unpackbits(np.frombuffer(writing.matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        width = min(bits.size, logits.shape[1])
        allowed[row, :width] = bits[:width]
    chosen: list[int] = logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf).argmax(-1).tolist()
    return chosen
