"""The GPU memory that a replica uses, beside its share and its plan. The GPU is simulated."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments import loaded_model
from deployments import replica as replicas
from deployments.checkpoints.footprint import CONTEXT_BYTES
from deployments.gpu_share import GpuShare, GpuUse, planned_bytes
from deployments.load_progress import LoadEvent, LoadProgress
from deployments.metrics import REGISTRY
from deployments.spec import Facts, ModelSpec
from serve.board.actor import Board
from serve.board.reporter import Reporter
from serve.board.reports import Replica, Report
from serve.config.tasks import model_spec
from serve.routes.models import get_model

MIB = 2**20
SPEC = model_spec("m", "rerank", "demo/rerank/checkpoint", gpu_share=0.1)
USE = GpuUse(0.1, 1000, 500, 600, False)


class Memory:
    """Memory in use on a GPU of 10,000 MiB, as a test sets it."""

    def __init__(self, mib: float) -> None:
        self.mib = mib

    def __call__(self) -> int:
        return int(self.mib * MIB)


def tenth(memory: Memory) -> GpuShare:
    """A share of a tenth of that GPU."""
    return GpuShare("m", 0.1, 10_000 * MIB, memory)


def test_use_is_reported_beside_share_and_plan() -> None:
    share = tenth(Memory(600))
    assert share.use() == GpuUse(0.1, 1000, None, 600, False)
    share.planned(500 * MIB)
    assert share.use() == USE


def test_only_what_changed_is_news() -> None:
    memory = Memory(600)
    share = tenth(memory)
    assert share.change() == share.use()
    assert share.change() is None
    memory.mib = 615
    assert share.change() is None, "1.5 % of the share"
    memory.mib = 625
    assert (share.change() or USE).used_mb == 625, (
        "compared with what was last reported, so that slow growth is noticed"
    )
    share.planned(500 * MIB)
    assert (share.change() or USE).planned_mb == 500
    memory.mib = 999
    share.change()
    memory.mib = 1001
    assert (share.change() or USE).over_share, "however small the change"


def test_a_replica_over_its_share_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory(900)
    share = tenth(memory)
    with caplog.at_level(logging.WARNING, "ray.serve"):
        for memory.mib in (900, 1210, 1300, 900, 1300):
            share.change()
    assert [record.getMessage() for record in caplog.records] == [
        "m uses 1210 MB of GPU memory, more than its share of 1000 MB; num_gpus: 0.13 would be enough"
    ]


def test_metrics_follow_use() -> None:
    memory = Memory(600)
    tenth(memory).planned(500 * MIB)

    def metrics() -> list[float | None]:
        names = ("share_bytes", "planned_bytes", "memory_bytes", "over_share")
        return [REGISTRY.get_sample_value(f"dure_gpu_{name}") for name in names]

    assert metrics() == [1000 * MIB, 500 * MIB, 600 * MIB, 0]
    memory.mib = 1100
    assert metrics() == [1000 * MIB, 500 * MIB, 1100 * MIB, 1]


@pytest.mark.parametrize(("share", "count", "share_mib"), [(0.25, 1, 2500), (2, 2, 20_000)])
def test_use_is_what_torch_reserves_on_all_gpus_of_a_share(
    monkeypatch: pytest.MonkeyPatch, share: float, count: int, share_mib: float
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: 300 * MIB)
    properties = SimpleNamespace(total_memory=10_000 * MIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: properties)
    use = GpuShare.on_cuda("m", share).use()
    assert (use.share_mb, use.used_mb) == (share_mib, count * (300 + CONTEXT_BYTES / MIB))


def test_only_a_source_on_this_machine_has_a_planned_figure() -> None:
    assert (planned_bytes(SPEC) or 0) > CONTEXT_BYTES
    assert planned_bytes(replace(SPEC, source="nobody/nothing", revision="main")) is None


class Outlet:
    def __init__(self) -> None:
        self.uses: list[GpuUse] = []

    def facts(self, facts: dict[str, Any], order: Any = None) -> None: ...

    def gpu(self, use: GpuUse) -> None:
        self.uses.append(use)


def loaded(device: str) -> Any:
    """A replica whose model has just been loaded."""
    replica: Any = object.__new__(replicas.ModelReplica)
    engine = SimpleNamespace(facts=Facts(device, "fp16", False, 1))
    replica.spec, replica.outlet, replica.gpu = SPEC, Outlet(), None
    replica.live = SimpleNamespace(spec=SPEC, engine=engine, in_steps=False, parallel=1, content="", load_seconds=1.0)
    return replica


def test_a_replica_reports_its_use_as_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(600)
    monkeypatch.setattr(replicas, "POLL_S", 0.01)
    monkeypatch.setattr(GpuShare, "on_cuda", lambda *_: tenth(memory))

    async def scenario() -> None:
        replica = loaded("cuda")
        await replica._report(None)
        await asyncio.sleep(0.05)
        memory.mib = 800
        await asyncio.sleep(0.05)
        polling = replica.polling
        replica.live.spec = replace(SPEC, precision="fp32")
        await replica._report(None)
        await asyncio.sleep(0.05)
        first, grown, reloaded = replica.outlet.uses
        assert [use.used_mb for use in (first, grown, reloaded)] == [600, 800, 800]
        assert reloaded.planned_mb > first.planned_mb
        assert replica.polling is polling, "a reload starts no second task"
        polling.cancel()

    asyncio.run(scenario())


def test_on_a_cpu_there_is_no_use_to_report() -> None:
    replica = loaded("cpu")
    asyncio.run(replica._report(None))
    assert replica.gpu is None
    assert replica.outlet.uses == []


def at(status: Any, name: str = "r") -> Replica:
    return Replica("m", name, LoadEvent(status, 100, "", ""))


def test_a_report_of_use_leaves_all_other_states_as_they_are() -> None:
    sent: list[Report] = []
    reporter = Reporter()
    reporter._lock = threading.Lock()
    reporter.board = SimpleNamespace(report=SimpleNamespace(remote=sent.append))
    reporter.last = Report("m", "r", states={"r": at("ready"), "r/1": at("loading_checkpoint", "r/1")})
    reporter.gpu(USE)
    [report] = sent
    assert report.states == {"r": replace(at("ready"), gpu=USE), "r/1": at("loading_checkpoint", "r/1")}
    reporter.facts({"device": "cuda"})
    assert sent[-1].states["r"].gpu == USE


def test_a_report_of_use_does_not_hide_that_another_replica_failed() -> None:
    async def scenario() -> None:
        board = Board()
        await board.report(Report("m", "r", states={"r": at("ready")}))
        await board.report(Report("m", "other", states={"other": at("failed", "other")}))
        await board.report(Report("m", "r", step=1, states={"r": replace(at("ready"), gpu=USE)}))
        assert board.replicas["m", "other"].event.status == "failed"
        assert board.replicas["m", "r"].gpu == USE

    asyncio.run(scenario())


def test_a_client_sees_the_use_of_each_replica() -> None:
    shown = [replace(at("ready"), gpu=USE), at("ready", "on a cpu")]
    watch = SimpleNamespace(of=lambda name: shown, state=lambda name: "ready")
    models = {"m": SimpleNamespace(task="rerank")}
    graph: Any = SimpleNamespace(models=models, named=models.get, watch=watch)
    model = asyncio.run(get_model("m", graph))
    assert [replica["gpu"] for replica in model["replicas"]] == [
        {"share": 0.1, "share_mb": 1000, "planned_mb": 500, "used_mb": 600, "over_share": False},
        None,
    ]


@pytest.mark.parametrize(("share", "visible"), [(0, ""), (0.1, "3")])
def test_a_replica_without_a_share_sees_no_gpu(monkeypatch: pytest.MonkeyPatch, share: float, visible: str) -> None:
    seen: list[str] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def load_engine(spec: ModelSpec, progress: LoadProgress) -> Any:
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        return SimpleNamespace(warm_up=lambda: None)

    monkeypatch.setattr(loaded_model, "load_engine", load_engine)
    progress = LoadProgress(lambda _: None)
    progress.preparing()
    loaded_model._load(replace(SPEC, gpu_share=share, threads=1), progress)
    assert seen == [visible], "before the engine's module imports torch"
