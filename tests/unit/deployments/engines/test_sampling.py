"""Sampling against transformers' own logits processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deployments.conversation import Sampling
from deployments.engines.sampling import Draws, choose, distribution

VOCABULARY = 5000


def logits(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize(
    "known",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 7},
        {"top_k": 4000, "top_p": 0.9},
        {"top_p": 0.3, "temperature": 2.0},
        {"top_p": 0.999},
        {"min_p": 0.1},
        {"top_k": 50, "top_p": 0.7, "min_p": 0.02, "temperature": 0.5},
    ],
)
def test_the_distribution_is_that_of_transformers(known: dict[str, Any]) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(known.get("temperature", 1.0))])
    if "top_k" in known:
        warpers.append(TopKLogitsWarper(known["top_k"]))
    if "top_p" in known:
        warpers.append(TopPLogitsWarper(known["top_p"]))
    if "min_p" in known:
        warpers.append(MinPLogitsWarper(known["min_p"]))
    expected = torch.softmax(warpers(None, logits()).double(), -1)[0].numpy()
    ids, weights = distribution(logits()[0], Sampling(**known))
    found = np.zeros(VOCABULARY)
    found[ids] = weights / weights.sum()
    assert np.allclose(found, expected, atol=2e-6)


def test_draws_follow_the_distribution() -> None:
    row = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    draws = Draws(Sampling(seed=3), [])
    counts = np.bincount([draws.draw(row) for _ in range(20_000)], minlength=4) / 20_000
    assert np.allclose(counts, torch.softmax(row, 0).numpy(), atol=0.015)
    assert counts[3] == 0


def test_repetition_counts_prompt_and_answer() -> None:
    draws = Draws(Sampling(repetition_penalty=1.3), [1, 2, 3])
    draws.wrote([7])
    row = logits()[0]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[1, 2, 3, 7]]), row[None].clone())[0]
    draws.shift(row)
    assert torch.allclose(row, expected)


def test_frequency_and_presence_count_the_answer_alone() -> None:
    draws = Draws(Sampling(frequency_penalty=0.5, presence_penalty=1.0, logit_bias={4: 100.0}), [1, 2])
    draws.wrote([7, 7, 8])
    row = torch.zeros(10)
    draws.shift(row)
    assert row.tolist() == [0, 0, 0, 0, 100, 0, 0, -2.0, -1.5, 0]


def test_a_seed_gives_the_same_token_in_any_batch() -> None:
    rows = logits(3)

    def drawn(which: list[int]) -> list[int]:
        return [choice.token for choice in choose(rows[which].clone(), [Draws(Sampling(seed=5), []) for _ in which])]

    together = drawn([0, 1, 2])
    assert [drawn([each])[0] for each in range(3)] == together
    assert len({Draws(Sampling(), []).draw(rows[0]) for _ in range(30)}) > 1, "without a seed draws differ"


def test_greedy_takes_the_likeliest_and_reports_the_raw_distribution() -> None:
    rows = logits(2)
    known = Sampling(temperature=0, top_logprobs=2, logit_bias={9: 1000.0})
    [biased, plain] = choose(rows.clone(), [Draws(known, []), Draws(Sampling(temperature=0), [])])
    raw = torch.log_softmax(rows[0], 0)
    assert biased.token == 9
    assert biased.logprob == pytest.approx(float(raw[9]))
    assert [token for token, _ in biased.top] == torch.topk(raw, 2).indices.tolist()
    assert (plain.token, plain.logprob) == (int(rows[1].argmax()), None)


def test_a_grammar_bounds_greedy_and_drawn_tokens() -> None:
    allowed = torch.zeros(2, VOCABULARY, dtype=torch.bool)
    allowed[:, 11] = True
    found = choose(logits(2), [Draws(Sampling(temperature=0), []), Draws(Sampling(top_p=0.5), [])], allowed)
    assert [choice.token for choice in found] == [11, 11]
