"""Memory planned from headers and configs, and the places of replicas on GPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from deployments import process
from deployments.checkpoints import loading
from deployments.checkpoints.footprint import CONTEXT_BYTES, HEAD_ROWS, NEXT_WORD, Footprint, footprint
from deployments.checkpoints.sources import ROOT
from deployments.engine_loading import load_engine
from deployments.engines import predictor
from deployments.load_progress import LoadProgress
from deployments.messages import Prompt
from deployments.spec import CheckpointError
from serve.config.base import SettingsError
from serve.config.file import read_config
from serve.config.settings import Settings
from serve.config.tasks import model_spec
from serve.planning import plan as planning
from serve.planning.plan import GIB, Need
from tests.dure import config_file
from tests.hub import COMMIT, write_cache
from tests.hub_server import environment, serving

VISION = model_spec("m", "vision", "demo/adverts/checkpoint")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_cache(folder)
    return folder


def folder_of(hub: Path, name: str) -> Path:
    return hub / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT


def dure_plan(hub: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **more}
    command = [sys.executable, "-m", "serve", "plan", *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=known, timeout=60, check=False, encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("task", "source", "precision"),
    [
        ("vision", "demo/adverts/checkpoint", "fp32"),
        ("vision", "demo/adverts/checkpoint", "bf16"),
        ("vision", "demo/adverts/checkpoint", "int8"),
        ("vision", "demo/adverts/checkpoint", "int4"),
        ("next_word", "demo/next_word/checkpoint", "bf16"),
        ("rerank", "demo/rerank/checkpoint", "fp32"),
    ],
)
def test_planned_weights_are_those_that_are_loaded(
    monkeypatch: pytest.MonkeyPatch, task: str, source: str, precision: str
) -> None:
    monkeypatch.setattr(loading, "plain_precision", lambda: "bf16")  # what is not quantised, as on a GPU
    spec = model_spec("m", task, source, precision=precision, runtime="torch")  # type: ignore[arg-type]
    loaded = load_engine(spec, LoadProgress(lambda _: None)).facts.weights_bytes
    assert footprint(spec, ROOT / source).weights / 1.05 == pytest.approx(loaded, rel=0.05)


def test_what_is_kept_and_computed_grows_with_what_may_be_on_its_way() -> None:
    folder = ROOT / VISION.source
    small, large = footprint(replace(VISION, max_batch_items=8), folder), footprint(VISION, folder)
    assert small.weights == large.weights
    assert small.cache < large.cache
    assert small.activations < large.activations
    none = footprint(replace(VISION, prefix_cache_mb=0), folder)
    assert large.cache - none.cache == 256 * 2**20


def test_what_is_computed_in_fp32_takes_twice_as_much() -> None:
    spec = replace(VISION, prefix_cache_mb=0)
    single, half, quantised = (
        footprint(replace(spec, precision=precision), ROOT / spec.source)  # type: ignore[arg-type]
        for precision in ("fp32", "fp16", "int8")
    )
    assert single.cache == 2 * half.cache
    assert 1.7 * half.activations < single.activations < 2 * half.activations  # scores are in float32 anyway
    assert (quantised.cache, quantised.activations) == (half.cache, half.activations)


def test_next_words_are_planned_for_the_largest_top_k() -> None:
    """Run with every candidate growing to its last token, as no real text makes them."""
    spec = model_spec("m", "next_word", "demo/next_word/checkpoint", precision="fp32", prefix_cache_mb=0)
    engine: Any = load_engine(spec, LoadProgress(lambda _: None))
    engine.ends_word = [False] * len(engine.ends_word)
    item = engine.prepare(Prompt("오늘 날씨가 " * 100, top_k=50))
    assert len(item.ids) == NEXT_WORD.prompt_tokens
    search = engine.begin(item)
    while search.result is None:
        engine.step([search])
    kept = sum(each.nbytes for each in search.sequence.kept)
    planned = footprint(replace(spec, max_batch_items=1), ROOT / spec.source).cache
    assert search.sequence.length == NEXT_WORD.prompt_tokens + NEXT_WORD.new_tokens
    assert 0.9 * planned < kept <= planned
    assert HEAD_ROWS == predictor.HEAD_ROWS


def test_real_models_take_what_is_known_of_them(hub: Path) -> None:
    seven = folder_of(hub, "llava-hf/llava-1.5-7b-hf")
    weights = {
        precision: footprint(replace(VISION, precision=precision), seven).weights / 1e9  # type: ignore[arg-type]
        for precision in ("fp32", "fp16", "int8", "int4")
    }
    assert 28 < weights["fp32"] < 31
    assert 14 < weights["fp16"] < 15.5
    assert 7 < weights["int8"] < 8
    assert 3.9 < weights["int4"] < 4.9
    kogpt2 = footprint(model_spec("m", "next_word", "x"), folder_of(hub, "skt/kogpt2-base-v2"))
    assert 0.25 < kogpt2.weights / 1e9 < 0.35


def test_of_a_model_that_is_not_here_the_headers_alone_are_fetched_for_a_plan(tmp_path: Path) -> None:
    llava = {path.name: path.read_bytes() for path in (ROOT / VISION.source).iterdir()}
    pickled = {"config.json": llava["config.json"], "pytorch_model.bin": bytes(4_000_000)}
    model = {"task": "vision", "revision": "main", "num_gpus": 0.4}
    models = {name: model | {"source": f"someone/{name}"} for name in ("llava", "pickled")}
    config = str(config_file(tmp_path, models, 8000))
    with serving() as hub:
        hub.add("someone/llava", llava)
        hub.add("someone/pickled", pickled)
        there = environment(hub, tmp_path / "cache")
        run = dure_plan(tmp_path / "cache", "--config", config, **there)
        assert run.returncode == 0, run.stderr
        shards = [name for name in llava if name.endswith(".safetensors")]
        assert len(shards) == 4
        assert all(0 < hub.sent[name] < len(llava[name]) / 2 for name in shards)
        assert "pytorch_model.bin" not in hub.sent
        hub.gated.add("someone/llava")
        refused = dure_plan(tmp_path / "cache", "--config", config, **there)
    assert (refused.returncode, "its owner has to grant access" in refused.stderr) == (2, True)


def test_a_checkpoint_without_weights_or_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config"):
        footprint(VISION, tmp_path)
    (tmp_path / "config.json").write_text(
        (ROOT / VISION.source / "config.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match="no weights"):
        footprint(VISION, tmp_path)


def test_weights_are_those_that_are_loaded_whatever_else_lies_there(tmp_path: Path) -> None:
    source = ROOT / VISION.source
    copy = tmp_path / "model"
    shutil.copytree(source, copy)
    known = footprint(VISION, source).weights
    shard = sorted(copy.glob("*.safetensors"))[0]
    shutil.copy(shard, copy / "another.safetensors")
    (copy / "pytorch_model.bin").write_bytes(bytes(1000))
    assert footprint(VISION, copy).weights == known
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shard.name}"):
        footprint(VISION, copy)


@pytest.mark.parametrize(("dtype", "weights"), [("float32", 250), ("bfloat16", 500)])
@pytest.mark.parametrize(("precision", "of_each"), [("fp32", 4), ("auto", 2), ("int8", 1)])
def test_pickles_are_counted_by_their_size(
    tmp_path: Path, dtype: str, weights: int, precision: Any, of_each: int
) -> None:
    config = (ROOT / VISION.source / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config.replace('"float16"', f'"{dtype}"'), encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(1000))
    assert footprint(replace(VISION, precision=precision), tmp_path).weights == round(1.05 * of_each * weights)


def need(name: str, booked: float, takes_gib: float, replicas: int = 1) -> Need:
    return Need(name, replicas, booked, Footprint(int(takes_gib * GIB), 0, 0, 0), replace(VISION, name=name))


def spread(booked: float, takes_gib: float, replicas: int = 1) -> Need:
    known = need("spread", booked, takes_gib, replicas)
    return replace(known, spec=replace(known.spec, device_map="balanced"))


def test_the_largest_go_first_and_where_the_least_is_left() -> None:
    needs = [need("small", 0.2, 1, replicas=3), need("large", 0.7, 5), need("middle", 0.5, 4)]
    made = planning.plan(needs, planning.gpus_of("2x10GiB"))
    assert [[each.model for each in gpu.replicas] for gpu in made.gpus] == [
        ["large", "small"],
        ["middle", "small", "small"],
    ]
    assert made.problems == []


def test_a_model_over_several_gpus_takes_empty_ones() -> None:
    needs = [spread(2, 12), need("small", 0.2, 1)]
    made = planning.plan(needs, planning.gpus_of("3x10GiB"))
    assert [[each.model for each in gpu.replicas] for gpu in made.gpus] == [["spread"], ["spread"], ["small"]]
    assert [gpu.free for gpu in made.gpus] == [0, 0, 0.8]
    assert made.problems == []


def test_a_model_over_several_gpus_that_finds_too_few_empty_ones_is_refused() -> None:
    made = planning.plan([spread(2, 12, replicas=2)], planning.gpus_of("3x10GiB"))
    assert made.problems == ["spread, replica 2 of 2, does not fit: it books 2 whole GPUs; empty: 1 of 3"]
    [problem] = planning.plan([spread(2, 20)], planning.gpus_of("2x10GiB")).problems
    assert "spread books 2 GPUs, 18.19 GiB, but needs 20.00 GiB" in problem
    [problem] = planning.plan([need("one", 2, 12)], planning.gpus_of("2x10GiB")).problems
    assert "one books 2 of a GPU, 9.09 GiB, but needs 12.00 GiB" in problem, "without a device_map it has one device"


def test_what_takes_more_than_it_books_is_refused_with_what_would_help() -> None:
    made = planning.plan([need("greedy", 0.1, 2)], planning.gpus_of("1x10GiB"))
    [problem] = made.problems
    assert "greedy books 0.1 of a GPU, 0.91 GiB, but needs 2.00 GiB: 1.09 GiB too much" in problem
    assert "; it fits with num_gpus: 0.22, or with prefix_cache_mb: 0" in problem


def test_what_takes_more_than_a_gpu_is_not_offered_more_of_it() -> None:
    [problem] = planning.plan([need("greedy", 0.1, 20)], planning.gpus_of("1x10GiB")).problems
    assert "it fits with prefix_cache_mb: 0" in problem
    assert "num_gpus" not in problem


def test_what_books_more_than_it_takes_is_offered_to_book_less() -> None:
    made = planning.plan([need("a", 0.71, 1), need("b", 0.6, 2.6)], planning.gpus_of("1x10GiB"))
    assert made.problems[0].endswith("; it fits with num_gpus: 0.29"), "all that is left"


@pytest.mark.parametrize("taken", [0.71, 0.86, 0.93])
def test_all_cents_that_are_left_are_offered(taken: float) -> None:
    made = planning.plan([need("a", taken, 1), need("b", 0.5, 4)], planning.gpus_of("1x10GiB"))
    assert made.problems[0].endswith(f"and num_gpus: {1 - taken:.2f}")


def test_where_nothing_is_left_nothing_is_offered() -> None:
    made = planning.plan([need("a", 1, 1), need("b", 0.2, 1)], planning.gpus_of("1x10GiB"))
    assert made.problems[0].endswith("; no setting of the model makes it fit; it needs a GPU with 1.00 GiB free")


def test_what_has_no_place_is_refused_by_how_much() -> None:
    made = planning.plan([need("a", 0.6, 1), need("b", 0.6, 1)], planning.gpus_of("1x10GiB"))
    [problem] = made.problems
    assert "b, replica 1 of 1, does not fit" in problem
    assert "1.82 GiB too little" in problem


@pytest.mark.parametrize("text", ["", "24GiB", "0x24GiB", "2x", "2x24", "ax24GiB", "1x0GiB"])
def test_gpus_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="COUNTxSIZE"):
        planning.gpus_of(text)


def test_the_shipped_config_fits_the_gpu_that_it_is_for(hub: Path) -> None:
    run = dure_plan(hub, "--config", "configs/gpu.yaml", "--gpus", "1x24GiB")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "vision" in run.stdout
    assert "GPU 0" in run.stdout


def test_the_most_replicas_in_production_fit_its_workers(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "described", lambda source, revision: folder_of(hub, source))
    needs = planning.needs_of(read_config(ROOT / "configs/production.yaml").settings)
    assert planning.plan(needs, planning.gpus_of("4x24GiB")).problems == []


def test_a_config_that_does_not_fit_says_what_would_help(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "described", lambda source, revision: folder_of(hub, source))
    needs = planning.needs_of(read_config(ROOT / "configs/gpu.yaml").settings)
    problems = planning.plan(needs, planning.gpus_of("1x16GiB")).problems
    [vision] = [problem for problem in problems if problem.startswith("vision books 0.43 of a GPU")]
    assert "it fits with num_gpus: 0.65, or with precision: int4" in vision


def test_what_the_shipped_config_offers_for_one_model_less_fits(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "described", lambda source, revision: folder_of(hub, source))
    path = ROOT / "configs/gpu.yaml"
    [offer] = re.findall(r"# +(num_gpus: .*) See `dure plan`", path.read_text(encoding="utf-8"))
    changes = yaml.safe_load("{" + offer.rstrip(". ") + "}")
    assert set(changes) == {"num_gpus", "max_batch_items", "max_batch_tokens", "prefix_cache_mb"}
    models = dict(read_config(path).settings.models)
    del models["vision-13b"]
    models["vision"] = models["vision"].model_copy(update=changes)
    assert planning.plan_for(Settings(models=models), "1x24GiB").problems == []


TWELVE = ROOT / "configs/examples/twelve-models.yaml"


def test_twelve_models_without_shares_find_their_places_on_two_large_gpus(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "described", lambda source, revision: folder_of(hub, source))
    made = planning.plan_for(read_config(TWELVE).settings, None)
    assert made.problems == []
    placed = Counter(need.model for gpu in made.gpus for need in gpu.replicas)
    assert placed == {need.model: need.replicas for need in made.needs}
    assert (len(placed), placed.total()) == (12, 24)
    for gpu in made.gpus:
        assert sum(need.footprint.total for need in gpu.replicas) <= gpu.memory_bytes
        assert gpu.free >= 0
    assert all(need.worked_out for need in made.needs)


def test_twelve_models_on_one_large_gpu_say_what_would_help(hub: Path) -> None:
    run = dure_plan(hub, "--config", str(TWELVE), "--gpus", "1x80GiB")
    assert run.returncode == 1
    [vision] = [line for line in run.stderr.splitlines() if line.startswith("vision, replica 3 of 3, does not fit")]
    assert "it fits with precision: int4, max_batch_items: 2, max_batch_tokens: 2048, prefix_cache_mb: 0" in vision


def test_a_replica_keeps_to_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", kept.append)
    gpu = SimpleNamespace(total_memory=10 * CONTEXT_BYTES)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    for share in (0, 0.25, 1, 2):
        process.keep_to_share(share)
    assert kept == [pytest.approx(0.15)]  # a tenth is CUDA's own
