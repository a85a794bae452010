"""The budget and what a batch costs, with measurements made up: the arithmetic, not a machine, is under test."""

from __future__ import annotations

import math

import pytest

from deployments.budget import GIB, Budget
from deployments.memory import CpuMemory
from deployments.pace import BatchCost


class Device(CpuMemory):
    def __init__(self, free: float, per_token: float = 0) -> None:
        self.free, self.per_token, self.tokens = int(free), per_token, 0

    def free_bytes(self) -> int:
        return self.free

    def batch_bytes(self) -> int:
        return int(self.per_token * self.tokens)


def drive(budget: Budget, seconds: float, per_token: float, batches: int, slow_above: float = math.inf) -> None:
    """Full batches of what the budget allows, on a machine with these costs."""
    for _ in range(batches):
        tokens = budget.tokens()
        budget.observe(tokens, seconds + per_token * tokens * (1 if tokens <= slow_above else 1.5), full=True)


def test_cost_is_learnt_from_batches_of_different_sizes() -> None:
    cost = BatchCost()
    for tokens in [16, 512, 64, 256, 1024] * 8:
        cost.observe(tokens, 0.004 + 0.0001 * tokens)
    assert cost.fixed == pytest.approx(0.004, rel=0.05)
    assert cost.per_token == pytest.approx(0.0001, rel=0.05)
    assert cost.overhead_tokens == pytest.approx(40, rel=0.1)


def test_an_outlier_moves_the_cost_little() -> None:
    cost = BatchCost()
    for tokens in [16, 512, 64, 256] * 8:
        cost.observe(tokens, 0.004 + 0.0001 * tokens)
    cost.observe(64, 10.0)
    assert cost.seconds(256) < 0.04


def test_the_budget_settles_at_the_knee() -> None:
    budget = Budget(16384, CpuMemory())
    for tokens in (16, 128, 1024, 4096, 16384):  # as load comes and goes
        budget.observe(tokens, 0.002 + 0.0001 * tokens * (1.5 if tokens > 2000 else 1), full=False)
    drive(budget, 0.002, 0.0001, 100, slow_above=2048)
    assert 512 <= budget.tokens() <= 2048


def test_the_budget_grows_where_larger_is_faster() -> None:
    budget = Budget(4096, CpuMemory())
    budget.observe(64, 0.1, full=True)
    drive(budget, 0.1, 0, 50)
    assert budget.tokens() == 4096


@pytest.mark.parametrize(("free_gib", "allowed"), [(0.5, 1000), (1.5, 2000), (8, 4000)])
def test_little_free_memory_means_small_batches(free_gib: float, allowed: int) -> None:
    assert Budget(4000, Device(free_gib * GIB)).tokens() == allowed


def test_measured_bytes_per_token_bound_the_budget() -> None:
    device = Device(4 * GIB, per_token=4 * 2**20)
    budget = Budget(100_000, device)
    device.tokens = 1000
    budget.observe(1000, 0.1, full=True)
    assert 700 < budget.tokens() < 900


def test_what_did_not_fit_is_not_tried_again_soon() -> None:
    budget = Budget(8192, CpuMemory())
    budget.out_of_memory(4000)
    assert budget.tokens() <= 2000
    drive(budget, 0, 0.001, 300)
    assert 2000 < budget.tokens() < 5500


def test_a_single_item_may_always_run() -> None:
    budget = Budget(4000, Device(0))
    budget.out_of_memory(1)
    assert budget.tokens() == 1
