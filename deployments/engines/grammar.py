"""An answer that is written token by token under a grammar, so that even a bad model answers in it.

Where the grammar leaves no choice, which in JSON is most of the time, its tokens are read along with the next one that
the model chooses, and take no step of their own. One that comes near its limit is brought to an end: from there on it
may only close what is open, wherever the grammar lets it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from llguidance import LLMatcher
from transformers import PreTrainedTokenizerBase

from deployments.engines.sequences import Sequence

CLOSE_FROM = 0.75
"""Of its limit: what is left must do for the names of the fields that are still to come."""


class Writing:
    """One answer on its way."""

    def __init__(self, sequence: Sequence, matcher: LLMatcher, eos: int, max_tokens: int) -> None:
        self.sequence = sequence
        self.matcher = matcher
        self.eos = eos
        self.max_tokens = max_tokens
        self.written: list[int] = []
        self.forced = 0
        """Of the tokens written, those that the grammar did not leave to the model."""
        self.to_read: list[int] = []
        """Of the tokens written, those that the model has not read."""
        self.ended = False
        if matcher.is_error():
            raise RuntimeError(f"the schema makes no grammar: {matcher.get_error()}")
        self._force()

    @property
    def is_full(self) -> bool:
        return len(self.written) >= self.max_tokens

    @property
    def should_close(self) -> bool:
        return len(self.written) >= CLOSE_FROM * self.max_tokens

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


class Closing:
    """Which tokens close what is open in JSON, and open nothing."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
        plain = [set(token) <= set('"]},') and ',"' not in token for token in tokens]
        self.strings = np.array([ok and token.startswith('"') for ok, token in zip(plain, tokens, strict=True)])
        self.lists = np.array([ok and token.startswith(("]", "}")) for ok, token in zip(plain, tokens, strict=True)])
        self.letter = tokens.index("a")

    def among(self, allowed: np.ndarray) -> np.ndarray:
        """Of the tokens that are allowed those that close; all where none does. Both bool, shape (vocabulary,)."""
        # Where a letter may stand a string is open, and brackets are part of it.
        for kind in (self.strings,) if allowed[self.letter] else (self.lists, self.strings):
            close = np.zeros_like(allowed)
            close[: kind.size] = kind[: close.size]
            close &= allowed
            if close.any():
                return close
        return allowed


def choose(logits: torch.Tensor, writings: Iterable[Writing], closing: Closing) -> list[int]:
    """For each answer the likeliest of the tokens that may follow; `logits` has shape (answers, vocabulary)."""
    allowed = np.zeros(logits.shape, dtype=bool)
    for row, writing in enumerate(writings):
        if writing.ended:
            continue
        bits = np.unpackbits(np.frombuffer(writing.matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        width = min(bits.size, logits.shape[1])
        allowed[row, :width] = bits[:width]
        if writing.should_close:
            allowed[row] = closing.among(allowed[row])
    chosen: list[int] = logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf).argmax(-1).tolist()
    return chosen
