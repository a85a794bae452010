"""Threads for a batch: as many as pay, by what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from deployments.batching.threads import ThreadChoice

Machine = Callable[[int, int], float]
"""Seconds of a batch, by its tokens and threads."""


def alone(tokens: int, threads: int) -> float:
    return 0.0002 * (threads - 1) + 0.0001 * tokens / threads


def crowded(tokens: int, threads: int) -> float:
    """Another process takes all cores but one: each layer waits for the thread that shares a core."""
    return 0.0001 * tokens * (1 if threads == 1 else 1.3)


def nearly_useless(tokens: int, threads: int) -> float:
    return 0.0001 * tokens / (1 + 0.1 * (threads - 1))


def drive(choice: ThreadChoice, machine: Machine, tokens: int, batches: int = 200) -> Counter[int]:
    """How often each count was chosen."""
    chosen: Counter[int] = Counter()
    for _ in range(batches):
        threads = choice.choose(tokens)
        choice.observe(tokens, threads, machine(tokens, threads))
        chosen[threads] += 1
    return chosen


def usual(chosen: Counter[int]) -> int:
    [(threads, times)] = chosen.most_common(1)
    assert times > 0.85 * chosen.total()
    return threads


@pytest.mark.parametrize(("most", "counts"), [(1, {1}), (2, {1, 2}), (6, {1, 2, 4, 6}), (8, {1, 2, 4, 8})])
def test_counts_are_powers_of_two_up_to_the_bound(most: int, counts: set[int]) -> None:
    assert set(ThreadChoice(most).counts) == counts
    assert set(drive(ThreadChoice(most), alone, 4096)) == counts, "each is tried"


def test_a_large_batch_alone_on_the_machine_takes_all_and_a_small_one_does_not() -> None:
    choice = ThreadChoice(8)
    assert usual(drive(choice, alone, 4096)) == 8
    assert usual(drive(choice, alone, 2)) == 1


def test_a_thread_that_adds_little_is_left_to_others() -> None:
    assert usual(drive(ThreadChoice(8), nearly_useless, 4096)) == 1


def test_it_follows_what_else_runs_on_the_machine() -> None:
    choice = ThreadChoice(2)
    assert usual(drive(choice, alone, 512)) == 2
    drive(choice, crowded, 512)
    assert usual(drive(choice, crowded, 512)) == 1
    drive(choice, alone, 512)
    assert usual(drive(choice, alone, 512)) == 2
