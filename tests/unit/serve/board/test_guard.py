"""When a machine is given no more work, and when it is again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve.board import guard as guards
from serve.board.guard import Guard, Load, Machine
from serve.config.model import ModelSettings
from serve.config.settings import GuardSettings, Settings


def test_work_is_taken_again_once_the_load_is_well_below_its_limit() -> None:
    memory = 0.5
    guard = Guard(GuardSettings(memory=0.9), lambda: Load(memory, 0.1, 0.0))
    said = []
    for share in (0.5, 0.89, 0.9, 0.95, 0.89, 0.86, 0.84, 0.89):
        memory = share
        guard.sample()
        said.append(bool(guard.reason))
    assert said == [False, False, True, True, True, True, False, False]


def test_each_limit_may_be_off_and_the_reason_names_the_others() -> None:
    guard = Guard(GuardSettings(memory=0.9, cpu=None, gpu_memory=0.8), lambda: Load(0.93, 1.0, 0.85))
    guard.sample()
    assert guard.reason == "memory is at 93% and gpu memory is at 85%"
    off = Guard(GuardSettings(memory=None, cpu=None, gpu_memory=None), lambda: Load(1.0, 1.0, 1.0))
    off.sample()
    assert off.reason == ""


def settings(*num_gpus: float, **guard: Any) -> Settings:
    """Of models with such shares."""
    models = {f"model{share}": ModelSettings(task="embedding", source="x", num_gpus=share) for share in num_gpus}
    return Settings(models=models, guard=GuardSettings(**guard))


def test_a_full_gpu_holds_up_nobody_who_does_not_use_it() -> None:
    both = settings(0.5, 0, gpu_memory=0.9)
    for model, reason in ((both.models["model0.5"], "gpu memory is at 99%"), (both.models["model0"], ""), (None, "")):
        guard = Guard(both.guard_of(model), lambda: Load(0.1, 0.1, 0.99))
        guard.sample()
        assert guard.reason == reason


def test_cpus_are_watched_only_where_no_model_may_take_all_of_them_or_as_is_said() -> None:
    assert settings(0.5).guard_of(None).cpu == 0.9
    assert settings(0.5, 0).guard_of(None).cpu is None
    assert settings(0.5, 0, cpu=0.8).guard_of(None).cpu == 0.8
    assert settings(0.5, cpu=None).guard_of(None).cpu is None


def test_a_replica_looks_at_the_gpus_that_are_its(monkeypatch: pytest.MonkeyPatch) -> None:
    used = {0: 20, 1: 90, 2: 50}
    monkeypatch.setattr(guards.pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(guards.pynvml, "nvmlDeviceGetCount", lambda: len(used))
    monkeypatch.setattr(guards.pynvml, "nvmlDeviceGetHandleByIndex", lambda number: number)
    monkeypatch.setattr(guards.pynvml, "nvmlDeviceGetHandleByUUID", {"GPU-b": 1}.__getitem__)
    monkeypatch.setattr(
        guards.pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(used=used[handle], total=100)
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Machine().load().gpu_memory == 0.9
    for visible, share in (("0,2", 0.5), ("GPU-b", 0.9), ("", 0.0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert Machine().load().gpu_memory == share


def test_this_machine_is_looked_at() -> None:
    found = Machine().load()
    assert 0 < found.memory < 1
    assert 0 <= found.cpu <= 1
    assert 0 <= found.gpu_memory <= 1


def test_a_container_with_a_quota_is_measured_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "CGROUP", tmp_path)
    monkeypatch.setattr(guards.psutil, "cpu_percent", lambda: 77.0)
    now = 100.0
    monkeypatch.setattr(guards, "time", SimpleNamespace(monotonic=lambda: now))
    machine, found = Machine(), []
    (tmp_path / "cpu.max").write_text("200000 100000\n", encoding="utf-8")  # two cores
    for now, used_us in ((100.0, 50_000_000), (103.0, 53_000_000), (105.0, 57_000_000), (106.0, 60_000_000)):  # noqa: B007
        (tmp_path / "cpu.stat").write_text(f"usage_usec {used_us}\nuser_usec 1\n", encoding="utf-8")
        found.append(machine.load().cpu)
    assert found == [0.0, 0.5, 1.0, 1.0]
    (tmp_path / "cpu.max").write_text("max 100000\n", encoding="utf-8")
    assert machine.load().cpu == 0.77
