from __future__ import annotations

import math
import random

from deployments.batching.cutting import cut


def test_items_of_like_length_leave_together() -> None:
    lengths = [10, 200, 11, 12, 210, 10]
    assert cut(lengths, 50, 32, 10_000) == [0, 2, 3, 5]
    assert cut([200, *lengths], 50, 32, 10_000) == [0, 2, 5]


def test_a_batch_that_costs_much_to_start_takes_all() -> None:
    lengths = [10, 200, 11, 12, 210, 10]
    assert cut(lengths, 5000, 32, 10_000) == [0, 1, 2, 3, 4, 5]
    assert cut(lengths, math.inf, 32, 10_000) == [0, 1, 2, 3, 4, 5]


def test_the_oldest_goes_first_whatever_its_length() -> None:
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 300) for _ in range(rng.randint(1, 80))]
        batch = cut(lengths, rng.choice([0, 30, 1000, math.inf]), rng.randint(1, 40), rng.randint(1, 2000))
        assert batch[0] == 0
        assert batch == sorted(set(batch))


def test_few_sizes_are_cut_while_others_wait() -> None:
    assert len(cut([10] * 21 + [200], 50, 32, 10_000)) == 16
    assert len(cut([10] * 21, 50, 32, 10_000)) == 21
    assert len(cut([10] * 21, 50, 12, 10_000)) == 12
    assert len(cut([10] * 5 + [200], 50, 32, 10_000)) == 5


def test_limits_hold() -> None:
    rng = random.Random(1)
    for _ in range(200):
        lengths = [rng.randint(1, 300) for _ in range(rng.randint(1, 80))]
        batch = cut(lengths, 100, 16, 1500)
        padded = len(batch) * max(lengths[place] for place in batch)
        assert len(batch) <= 16
        assert padded <= 1500 or len(batch) == 1


def test_like_lengths_cost_less_than_arrival_order() -> None:
    """Tokens to compute, overhead counted, for 2,000 items of mixed length that all wait."""
    rng = random.Random(2)
    overhead = 60

    def cost(by_length: bool) -> float:
        waiting = [rng.randint(4, 250) for _ in range(2000)]
        total = 0.0
        while waiting:
            queue = waiting[:64]
            batch = cut(queue, overhead, 32, 4096) if by_length else list(range(min(16, len(queue))))
            total += overhead + len(batch) * max(queue[place] for place in batch)
            waiting = [length for place, length in enumerate(waiting) if place not in set(batch)]
        return total

    assert cost(by_length=True) < 0.75 * cost(by_length=False)
