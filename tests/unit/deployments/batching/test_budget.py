"""The budget and what a batch costs, with measurements made up: the arithmetic, not a machine, is under test."""

from __future__ import annotations

import math

import pytest
import torch

from deployments.batching.batch_cost import BatchCost
from deployments.batching.budget import GIB, Budget
from deployments.memory import CpuMemory, device_memory
from deployments.precision import choosing
from deployments.spec import ModelSpec


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


def test_a_small_share_is_made_for_the_largest_batch() -> None:
    device = Device(0.3 * GIB, per_token=2**20)
    device.is_share = True
    budget = Budget(4000, device)
    assert budget.tokens() == 4000
    device.tokens = 100
    budget.observe(100, 0.1, full=True)
    assert budget.tokens() == int(0.8 * 0.3 * 1024), "what was measured counts, however small the share is"


@pytest.mark.parametrize(
    ("fraction", "free_mib"),
    [
        (1.0, 700),  # 600 on the device, and 100 that torch has set aside
        (0.09, 600),  # 900 of 10,000, of which 300 are taken
        (0.5, 700),  # others have taken what is left of the share
        (0.02, 0),
    ],
)
def test_free_is_what_the_device_has_and_the_share_leaves(
    monkeypatch: pytest.MonkeyPatch, fraction: float, free_mib: int
) -> None:
    mib = 2**20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (600 * mib, 10_000 * mib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 400 * mib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 300 * mib)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: fraction)
    memory = device_memory("cuda")
    assert memory.free_bytes() == free_mib * mib
    assert memory.is_share == (fraction < 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    spec = ModelSpec("m", "", "", gpu_share=0.5)
    assert (choosing._too_large(spec, 150 * mib // 4) is None) == (150 * mib <= 0.25 * free_mib * mib)


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


def test_on_a_cpu_the_first_batch_is_no_larger_than_pays() -> None:
    assert Budget(16384, CpuMemory()).tokens() < 4096
    assert Budget(512, CpuMemory()).tokens() == 512
    assert Budget(16384, Device(100 * GIB)).tokens() == 16384
