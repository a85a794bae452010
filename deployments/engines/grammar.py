"""Generates an answer token by token under a grammar, so that even a bad model's answer is well formed.

Most tokens of JSON are forced: the grammar leaves no choice. They take no step of their own, as the model reads them
together with the next token that it chooses. Near its limit an answer is wrapped up: from there on it may only close
what is open, wherever the grammar allows that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from transformers import PreTrainedTokenizerBase

from deployments.engines.sequences import Sequence

COMPACT: Any = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
"""llguidance's settings for JSON without spaces."""
CLOSE_FROM = 0.75
"""Share of the token limit at which closing starts. The rest must suffice for the names of the remaining fields."""


class Writing:
    """One answer being generated."""

    def __init__(self, sequence: Sequence, matcher: LLMatcher, eos: int, max_tokens: int) -> None:
        self.sequence = sequence
        self.matcher = matcher
        self.eos = eos
        self.max_tokens = max_tokens
        self.written: list[int] = []
        self.forced = 0
        """Number of written tokens that the grammar forced."""
        self.to_read: list[int] = []
        """Written tokens that the model has not read yet."""
        self.ended = False
        if matcher.is_error():
            raise RuntimeError(f"the schema can't be made into a grammar: {matcher.get_error()}")
        self._force()

    @property
    def is_full(self) -> bool:
        return len(self.written) >= self.max_tokens

    @property
    def should_close(self) -> bool:
        return len(self.written) >= CLOSE_FROM * self.max_tokens

    def write(self, token: int) -> None:
        """Append the token that the model chose, and the tokens that must follow it."""
        self.to_read = []
        if self.ended:  # the forced tokens had already ended the answer
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
            self.matcher.consume_tokens(tokens)  # a matcher that fails stops
        self.ended = self.matcher.is_stopped() or self.eos in tokens
        tokens = [token for token in tokens if token != self.eos]
        self.written += tokens
        self.to_read += tokens


class Closing:
    """Knows the tokens that close what is open in JSON and open nothing."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
        plain = [set(token) <= set('"]},') and ',"' not in token for token in tokens]
        self.strings = np.array([ok and token.startswith('"') for ok, token in zip(plain, tokens, strict=True)])
        self.lists = np.array([ok and token.startswith(("]", "}")) for ok, token in zip(plain, tokens, strict=True)])
        self.letter = tokens.index("a")

    def among(self, allowed: np.ndarray) -> np.ndarray:
        """The allowed tokens that close; all allowed tokens if none does. Both are bool, shape (vocabulary,)."""
        # If a letter is allowed, a string is open, and brackets would be part of it.
        for kind in (self.strings,) if allowed[self.letter] else (self.lists, self.strings):
            close = np.zeros_like(allowed)
            close[: kind.size] = kind[: close.size]
            close &= allowed
            if close.any():
                return close
        return allowed


def allowed_tokens(matcher: LLMatcher, vocabulary: int) -> np.ndarray:
    """The tokens that the grammar allows next: bool, shape (vocabulary,)."""
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
    allowed = np.zeros(vocabulary, dtype=bool)
    width = min(bits.size, vocabulary)
    allowed[:width] = bits[:width]
    return allowed


def choose(logits: torch.Tensor, writings: Iterable[Writing], closing: Closing) -> list[int]:
    """The likeliest allowed token for each answer. `logits` has shape (answers, vocabulary)."""
    allowed = np.zeros(logits.shape, dtype=bool)
    for row, writing in enumerate(writings):
        if writing.ended:
            continue
        allowed[row] = allowed_tokens(writing.matcher, logits.shape[1])
        if writing.should_close:
            allowed[row] = closing.among(allowed[row])
    chosen: list[int] = logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf).argmax(-1).tolist()
    return chosen
