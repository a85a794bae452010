"""Chooses the next token of each answer: temperature, cuts of the distribution, penalties, bias and seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deployments.conversation import Sampling

CANDIDATES = 256
"""Likeliest tokens sorted first. Where `top_p` needs more of them, the whole vocabulary is sorted."""
COLDEST = 1e-3
"""Lowest temperature of a draw. Here the likeliest token has all of the probability."""


@dataclass(frozen=True)
class Choice:
    token: int
    logprob: float | None = None
    """Of the model's own distribution, before temperature, penalties, bias and grammar."""
    top: tuple[tuple[int, float], ...] = ()


class Draws:
    """The state of one answer's sampling."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self.random = np.random.Generator(np.random.PCG64(sampling.seed))
        self.counts: Counter[int] = Counter()
        self.penalty = 1.0 if sampling.repetition_penalty is None else sampling.repetition_penalty
        self._seen = set(prompt) if self.penalty != 1 else set()

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature == 0 or self.sampling.top_k == 1

    @property
    def is_plain(self) -> bool:
        """Whether logits are drawn from as they are."""
        known = self.sampling
        return not (self._seen or known.logit_bias or known.frequency_penalty or known.presence_penalty)

    def wrote(self, tokens: Sequence[int]) -> None:
        """Count tokens of the answer, whether they were drawn or forced."""
        self.counts.update(tokens)
        if self.penalty != 1:
            self._seen.update(tokens)

    def shift(self, row: torch.Tensor) -> None:
        """Apply bias and penalties to the logits of one row, in place."""
        known = self.sampling
        if self._seen:
            ids = torch.tensor(sorted(self._seen), device=row.device)
            scores = row[ids]
            row[ids] = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        if self.counts and (known.frequency_penalty or known.presence_penalty):
            ids = torch.tensor(list(self.counts), device=row.device)
            counts = torch.tensor(list(self.counts.values()), device=row.device, dtype=row.dtype)
            row[ids] -= known.frequency_penalty * counts + known.presence_penalty
        if known.logit_bias:
            ids = torch.tensor(list(known.logit_bias), device=row.device)
            row[ids] += torch.tensor(list(known.logit_bias.values()), device=row.device, dtype=row.dtype)

    def draw(self, row: torch.Tensor) -> int:
        """Draw a token from the logits of one row."""
        ids, weights = distribution(row, self.sampling)
        possible = np.flatnonzero(weights)
        if not possible.size:  # nothing is a number
            return int(ids[0])
        below = np.cumsum(weights)
        at = np.searchsorted(below, self.random.random() * below[-1], side="right")
        return int(ids[min(int(at), possible[-1])])


def distribution(row: torch.Tensor, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn, and their probabilities (float64). Likeliest first, if the distribution is cut.

    The cuts come in transformers' order: temperature, top_k, top_p, min_p.
    """
    temperature = 1.0 if sampling.temperature is None else sampling.temperature
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    min_p = sampling.min_p or 0.0
    scores = row.float() / max(temperature, COLDEST)
    most = min(sampling.top_k or row.shape[0], row.shape[0])
    cuts_tail = most < row.shape[0] or top_p < 1 or min_p > 0
    if not cuts_tail:
        return np.arange(row.shape[0]), np.nan_to_num(torch.softmax(scores, 0).double().cpu().numpy())
    total = float(torch.logsumexp(scores, 0))
    count = min(CANDIDATES, most)
    while True:
        values, ids = torch.topk(scores, count)
        logs = values.double().cpu().numpy()
        kept = total
        if most < row.shape[0]:  # probabilities among the `top_k`
            kept = float(torch.logsumexp(torch.topk(scores, most).values, 0))
        with np.errstate(invalid="ignore"):  # infinite logits
            weights = np.nan_to_num(np.exp(logs - kept))
        before = np.cumsum(weights) - weights
        inside = (before < top_p) | (np.arange(count) == 0)
        inside &= (weights >= min_p * weights[0]) & (weights > 0)
        inside[0] = True  # also where nothing is a number
        if not inside.all() or count == most:
            return ids.cpu().numpy()[inside], weights[inside]
        count = most


def choose(logits: torch.Tensor, draws: Sequence[Draws], allowed: torch.Tensor | None = None) -> list[Choice]:
    """The next token of each answer. `logits` is float32, shape (answers, vocabulary), and is changed.

    `allowed` has the tokens that each answer's grammar allows: bool, of the same shape.
    """
    reported = [_reported(row, each.sampling) for row, each in zip(logits, draws, strict=True)]
    for row, each in zip(logits, draws, strict=True):
        if not each.is_plain:
            each.shift(row)
    if allowed is not None:
        logits.masked_fill_(~allowed, -torch.inf)
    likeliest: list[int] = logits.argmax(-1).tolist()
    tokens = [
        token if each.is_greedy else each.draw(row) for token, row, each in zip(likeliest, logits, draws, strict=True)
    ]
    return [
        Choice(token) if known is None else Choice(token, float(known[token]), _top(known, each.sampling))
        for token, known, each in zip(tokens, reported, draws, strict=True)
    ]


def _reported(row: torch.Tensor, sampling: Sampling) -> torch.Tensor | None:
    return None if sampling.top_logprobs is None else torch.log_softmax(row, 0)


def _top(logprobs: torch.Tensor, sampling: Sampling) -> tuple[tuple[int, float], ...]:
    if not sampling.top_logprobs:
        return ()
    values, ids = torch.topk(logprobs, sampling.top_logprobs)
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))
