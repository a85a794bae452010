from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from deployments.collector import Collector
from deployments.messages import Refusal


@dataclass(frozen=True)
class Rows:
    vectors: np.ndarray
    tokens: np.ndarray


def rows(*numbers: int) -> Rows:
    tokens = np.array(numbers, np.int32)
    return Rows(np.stack([tokens, -tokens], 1).astype(np.float32), tokens)


def test_pieces_come_together_in_any_order() -> None:
    rng = random.Random(0)
    for count in (1, 2, 7, 40):
        places = list(range(count))
        rng.shuffle(places)
        collector = Collector(count)
        while places:
            size = rng.randint(1, len(places))
            some, places = places[:size], places[size:]
            batch = [99, *some, 98]  # a batch holds items of other calls, too
            collector.put(some, rows(*batch), range(1, len(batch) - 1))
        assert collector.left == 0
        results = collector.answers().results
        assert results.tokens.tolist() == list(range(count))
        assert results.vectors.dtype == np.float32
        assert results.vectors[:, 1].tolist() == [-place for place in range(count)]


def test_lists_and_refusals_keep_their_places() -> None:
    collector = Collector(4)
    collector.refuse(2, Refusal("too long"))
    collector.put([3, 0], ["c", "x", Refusal("no"), "a"], [2, 3])
    collector.put([1], ["b"], [0])
    answers = collector.answers()
    assert collector.left == 0
    assert answers.results[:2] == ["a", "b"]
    assert answers.refusals == {2: Refusal("too long"), 3: Refusal("no")}


def test_all_refused_is_an_answer() -> None:
    collector = Collector(1)
    collector.refuse(0, Refusal("no"))
    assert collector.left == 0
    assert collector.answers().refusals == {0: Refusal("no")}
