"""Shares of a GPU that a config leaves out."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import serve
from ray.serve._private.build_app import build_app
from typer.testing import CliRunner

from deployments.checkpoints.sources import ROOT
from serve import app
from serve.calls.graph import Graph
from serve.cli import main
from serve.config.base import SettingsError
from serve.config.file import read_config
from serve.config.gpus import Gpus
from serve.config.settings import Settings
from serve.operate import preflight
from serve.planning.plan import DEFAULT_GPUS, needs_of, plan_for, with_shares
from tests.unit.serve.config.test_settings import written

GPUS = "1x24GiB"
RERANKER = {"task": "rerank", "source": "demo/rerank/checkpoint"}
FROM_HUB = {"task": "rerank", "source": "nobody/nothing", "revision": "main"}


def settings(gpus: str | None, **models: dict[str, Any]) -> Settings:
    return Settings.model_validate({"models": models} | ({"gpus": gpus} if gpus else {}))


def test_a_share_left_out_is_the_least_that_will_do() -> None:
    left_out = settings(GPUS, m=RERANKER)
    share = with_shares(left_out).models["m"].gpu_share
    assert share == needs_of(left_out)[0].least(Gpus.parse(GPUS).memory_bytes)
    assert 0 < share < 0.2
    assert share == round(share, 2)
    assert with_shares(settings("1x80GiB", m=RERANKER)).models["m"].gpu_share < share
    assert left_out.models["m"].num_gpus is None, "what is given stays as it is"


@pytest.mark.parametrize(
    ("gpus", "given", "share"), [(GPUS, 0, 0), (GPUS, 0.5, 0.5), (None, None, 0), (None, 0.5, 0.5)]
)
def test_a_share_given_stands_and_without_gpus_there_is_none(
    gpus: str | None, given: float | None, share: float
) -> None:
    model = with_shares(settings(gpus, m=FROM_HUB | {"num_gpus": given})).models["m"]
    assert model.gpu_share == model.spec("m").gpu_share == share


def test_what_is_filled_in_is_what_is_booked_and_kept_to() -> None:
    built = app.build(settings(GPUS, m=RERANKER, cpu=RERANKER | {"num_gpus": 0, "threads": 1}))
    filled, models, _ = built._bound_deployment.init_args
    share = filled.models["m"].gpu_share
    deployments = {name: model._bound_deployment for name, model in models.items()}
    assert {name: each.ray_actor_options["num_gpus"] for name, each in deployments.items()} == {"m": share, "cpu": 0}
    specs = {name: each.init_args[0] for name, each in deployments.items()}
    assert {name: spec.gpu_share for name, spec in specs.items()} == {"m": share, "cpu": 0}
    assert share > 0
    assert specs["cpu"].own_cores, "a model on a GPU takes no cores"


def test_large_shares_are_started_before_small_ones_take_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {"a": 0.1, "b": 0.6, "c": 0, "d": 0.3}
    config = settings(None, **{name: RERANKER | {"num_gpus": share} for name, share in shares.items()})
    built = build_app(app.build(config), name="dure")
    assert [deployment.name for deployment in built.deployments] == ["b", "d", "a", "c", "ingress"]
    context = SimpleNamespace(deployment="ingress", replica_id=SimpleNamespace(unique_id="1"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr("serve.calls.graph.Model", lambda name, *_: SimpleNamespace(name=name, task="rerank"))
    handles: Any = dict.fromkeys(["b", "d", "a", "c"])
    graph = Graph.of(config, handles, {})
    assert list(graph.models) == ["a", "b", "c", "d"], "of models with a task the config's first is asked by default"


def test_what_is_filled_in_is_asked_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = read_config(written(tmp_path, args__gpus=GPUS))
    with pytest.raises(SettingsError, match=r"predictor 0.*this machine has 0"):
        preflight.check_gpus(config.settings)


@pytest.mark.parametrize(
    ("shares", "gpus", "fits"),
    [
        ((0.33, 0.56, 0.11), 1, True),
        ((0.6, 0.6), 2, True),
        ((0.6, 0.6, 0.6), 2, False),
        ((2,), 2, True),
        ((2,), 1, False),
        ((2, 0.1), 2, False),
    ],
)
def test_what_starts_first_has_to_find_its_place_on_the_machine(
    monkeypatch: pytest.MonkeyPatch, shares: tuple[float, ...], gpus: int, fits: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    models = {f"m{number}": FROM_HUB | {"num_gpus": share} for number, share in enumerate(shares)}
    config: Any = SimpleNamespace(settings=settings(None, **models), path="mine.yaml")
    with contextlib.nullcontext() if fits else pytest.raises(SettingsError, match=f"this machine has {gpus}"):
        preflight.check_gpus(config.settings)


@pytest.mark.parametrize(("gpus", "fits"), [(0, False), (1, True)])
def test_a_model_that_sleeps_takes_no_place_but_needs_a_gpu_to_wake_up_on(
    monkeypatch: pytest.MonkeyPatch, gpus: int, fits: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    asleep = FROM_HUB | {"num_gpus": 0.6, "autoscaling": {"min_replicas": 0}}
    config: Any = SimpleNamespace(settings=settings(None, a=asleep, b=asleep), path="mine.yaml")
    with contextlib.nullcontext() if fits else pytest.raises(SettingsError, match="this machine has 0"):
        preflight.check_gpus(config.settings)


def test_an_engine_outside_dure_has_the_place_that_it_books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    own = {"task": "tests.engines:Shout", "source": "tests", "num_gpus": 0.8}
    file = written(tmp_path, args__models={"own": own, "reranker": RERANKER | {"num_gpus": 0.25}})
    run = CliRunner().invoke(main.app, ["plan", "--config", str(file), "--gpus", "2x24GiB"])
    assert run.exit_code == 0, run.output
    assert "[own 80%]" in run.output
    assert "[reranker 25%]" in run.output
    [problem] = plan_for(settings(None, own=own | {"autoscaling": {"max_replicas": 2}}), "1x24GiB").problems
    assert problem.startswith("own, replica 2 of 2, does not fit")
    assert problem.endswith("too little")


def test_a_plan_names_the_models_that_use_no_gpu() -> None:
    run = CliRunner().invoke(main.app, ["plan", "--config", str(ROOT / "configs/local.yaml"), "--gpus", "1x24GiB"])
    assert run.exit_code == 0
    assert "On the CPU, without num_gpus or gpus: predictor, vision, embedder, reranker" in run.output


def test_what_can_not_be_had_is_named() -> None:
    with pytest.raises(
        SettingsError, match=r"the GPU memory that m needs can't be worked out: .* HF_HUB_OFFLINE is set"
    ):
        with_shares(settings(GPUS, m=FROM_HUB))
    for source in ("demo/nowhere/at/all", "package:nowhere/at/all", "serve/routes"):
        with pytest.raises(SettingsError, match=r"no folder|not installed|config"):
            with_shares(settings(GPUS, m=RERANKER | {"source": source, "revision": "main"}))


def test_more_than_a_gpu_is_refused_with_what_would_help() -> None:
    greedy = RERANKER | {"max_batch_tokens": 2**20}
    with pytest.raises(SettingsError, match=r"m needs .* GiB, but a GPU of gpus: 1x1GiB has 0.91 GiB; it fits with"):
        with_shares(settings("1x1GiB", m=greedy))
    [problem] = plan_for(settings("1x1GiB", m=greedy), None).problems
    assert "does not fit" in problem
    assert "num_gpus" not in problem


def test_a_model_over_several_gpus_says_how_many() -> None:
    with pytest.raises(ValueError, match="m: a model with device_map needs num_gpus"):
        settings(GPUS, m=RERANKER | {"device_map": "auto"})


@pytest.mark.parametrize(
    ("gpus", "torch_gib"),
    [
        ("1x16GiB", 14.56),  # T4
        ("1x24GiB", 22.0),  # L4, A10G
        ("1x48GiB", 44.4),  # L40
        ("1x80GiB", 79.1),  # A100, H100
        ("1x80GB", 79.1),
    ],
)
def test_no_more_is_planned_than_a_card_has(gpus: str, torch_gib: float) -> None:
    assert 0.9 * torch_gib < Gpus.parse(gpus).memory_bytes / 2**30 <= torch_gib


@pytest.mark.parametrize("gpus", ["24GiB", "0x24GiB", 2])
def test_gpus_that_are_none_are_refused_by_name(tmp_path: Path, gpus: Any) -> None:
    with pytest.raises(SettingsError, match=r"args\.gpus"):
        read_config(written(tmp_path, args__gpus=gpus))


def test_a_plan_is_for_the_gpus_of_the_config_unless_told_otherwise() -> None:
    left_out = settings("2x80GiB", m=RERANKER)
    assert [len(plan_for(left_out, gpus).gpus) for gpus in (None, "3x8GiB")] == [2, 3]
    large, small = (plan_for(left_out, gpus).needs[0].booked for gpus in (None, "1x8GiB"))
    assert large < small, "shares are of the GPUs that are planned for"
    bare = plan_for(settings(None, m=RERANKER), None)
    assert (bare.needs, len(bare.gpus)) == ([], int(DEFAULT_GPUS[0]))


def test_a_plan_marks_what_it_has_worked_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = written(tmp_path, args__gpus=GPUS, args__models={"a": RERANKER, "b": RERANKER | {"num_gpus": 0.25}})
    printed = CliRunner().invoke(main.app, ["plan", "--config", str(file)]).output
    assert "[a ~" in printed
    assert "[b 25%]" in printed
    assert printed.count("~") == 2
