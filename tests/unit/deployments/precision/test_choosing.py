"""Precision is chosen by measurement, refused by the gate, and remembered."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from deployments import disk_cache
from deployments.checkpoints.loading import plain_precision
from deployments.checkpoints.sources import ROOT
from deployments.engines import calibration
from deployments.engines.openvino import OpenVinoForward
from deployments.engines.predictor import Predictor
from deployments.engines.reranker import Reranker
from deployments.load_progress import LoadEvent, LoadProgress
from deployments.messages import Pair, Scores
from deployments.precision import choosing, measuring
from deployments.precision.choosing import load_best
from deployments.spec import ModelSpec
from serve.config.tasks import model_spec
from tests import checkpoints
from tests.rounding import Rounding

CROSS = ROOT / "demo/rerank/checkpoint"
SPEC = model_spec("m", "rerank", str(CROSS), threads=1)
needs_bf16 = pytest.mark.skipif(plain_precision() != "bf16", reason="this machine does not multiply bf16")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """And short measurements: that they are made counts here, not what they find."""
    monkeypatch.setenv("DURE_CACHE", str(tmp_path))
    monkeypatch.setattr(measuring, "TIMED_S", 0.02)
    return tmp_path


def load(spec: ModelSpec = SPEC, engine: Any = Reranker, folder: Path = CROSS) -> tuple[Any, list[LoadEvent]]:
    events: list[LoadEvent] = []
    return load_best(engine, spec, folder, LoadProgress(events.append)), events


def measured(events: list[LoadEvent]) -> bool:
    return "Measuring precision" in [event.message for event in events]


class Spoilt(Reranker):
    """Whatever is not the original has noise on its weights."""

    runtimes = ("torch",)

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Spoilt:
        loaded = super().load(spec, folder, progress)
        if spec.precision != "fp32":
            torch.manual_seed(0)
            with torch.no_grad():
                for weights in loaded.encoder.forward.model.parameters():  # type: ignore[attr-defined]
                    weights += torch.randn_like(weights) * 0.2
        return cls(loaded.encoder)


@needs_bf16
def test_auto_takes_at_most_60_percent_of_the_bytes_and_shows_its_figures() -> None:
    engine, events = load()
    original = load(replace(SPEC, precision="fp32"))[0]
    assert engine.facts.precision in ("bf16", "int8")
    assert engine.facts.weights_bytes <= 0.6 * original.facts.weights_bytes
    assert original.facts.quality is None
    assert engine.facts.quality["verdict"] == "kept"
    assert min(engine.facts.quality["metrics"].values()) >= 0.95
    names = {(each["runtime"], each["precision"]) for each in engine.facts.quality["candidates"]}
    assert {("torch", "fp32"), ("torch", "bf16"), ("openvino", "bf16"), ("openvino", "int8")} <= names
    served = next(
        each
        for each in engine.facts.quality["candidates"]
        if (each["runtime"], each["precision"]) == (engine.facts.runtime, engine.facts.precision)
    )
    assert all(speed > 0 for speed in served["items_per_s"].values())
    assert measured(events)
    assert [event.progress for event in events] == sorted(event.progress for event in events)


def test_a_choice_is_remembered_and_forgotten_with_its_file(empty_cache: Path) -> None:
    first, events = load(engine=Rounding)
    assert measured(events)
    again, events = load(engine=Rounding)
    assert not measured(events)
    assert again.facts == first.facts
    [file] = empty_cache.glob("choice-*.json")
    file.write_text("{broken", encoding="utf-8")
    anew, events = load(engine=Rounding)
    assert measured(events)
    assert anew.facts.quality["verdict"] == "kept"
    assert not choosing._is_choice([])
    assert not list(empty_cache.glob("*.part"))


def test_another_machine_model_or_setting_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(engine=Rounding)
    assert measured(load(replace(SPEC, threads=2), Rounding)[1])
    monkeypatch.setattr(disk_cache, "processor", lambda: "another")
    assert measured(load(engine=Rounding)[1])


def test_replicas_that_start_together_measure_once() -> None:
    script = (
        "from tests.unit.deployments.precision.test_choosing import *; measuring.TIMED_S = 0.02; "
        "engine, events = load(engine=Rounding); print(measured(events), engine.facts)"
    )
    replicas = [
        subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        for _ in range(2)
    ]
    said = [replica.communicate()[0].strip().splitlines()[-1].split(" ", 1) for replica in replicas]
    assert sorted(measured for measured, _ in said) == ["False", "True"]
    assert said[0][1] == said[1][1]


@pytest.mark.parametrize("precision", ["auto", "bf16"])
@needs_bf16
def test_a_bad_candidate_is_refused_and_the_original_is_served(precision: Any) -> None:
    engine, _ = load(replace(SPEC, precision=precision), Spoilt)
    assert (engine.facts.runtime, engine.facts.precision) == ("torch", "fp32")
    bad = next(each for each in engine.facts.quality["candidates"] if each["precision"] == "bf16")
    assert bad["verdict"] == "refused"
    assert min(bad["metrics"].values()) < 0.9
    assert engine.facts.quality["verdict"] == "refused"
    assert "bf16 (torch) refused" in engine.facts.fallback_reason
    original = load(replace(SPEC, precision="fp32"))[0]
    pair = original.prepare(Pair("When is it due?", "In March."))
    assert engine.run([pair]).logits == original.run([pair]).logits


@needs_bf16
def test_where_openvino_cant_keep_its_graph_the_best_of_torch_is_served_and_the_reason_is_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DURE_CACHE", str(tmp_path / "file"))
    engine, _ = load(replace(SPEC, runtime="openvino"))
    assert (engine.facts.runtime, engine.facts.precision) == ("torch", "bf16")
    assert "OpenVINO failed" in engine.facts.fallback_reason
    assert engine.facts.quality["verdict"] == "kept"


@pytest.mark.parametrize(
    ("nearness", "verdict"), [(1, "kept"), (0.95, "kept"), (0.9499, "warned"), (0.9, "warned"), (0.8999, "refused")]
)
def test_the_gate(nearness: float, verdict: str) -> None:
    assert measuring._verdict(nearness) == verdict


def test_an_original_too_large_for_the_memory_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "FREE_SHARE", 0.0)
    engine, events = load()
    assert not measured(events)
    assert engine.facts.precision == plain_precision()
    assert engine.facts.quality is None
    assert "not measured" in engine.facts.fallback_reason


@needs_bf16
def test_next_words_are_compared_by_their_best_word() -> None:
    folder = ROOT / "demo/next_word/checkpoint"
    engine, _ = load(model_spec("m", "next_word", str(folder), threads=1), Predictor, folder)
    assert engine.facts.precision == "bf16"
    assert engine.facts.quality["metrics"]["same_word"] >= 0.95


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_no_number_refuses_and_says_so(figure: float, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Rounding.agreement

    def agreement(original: list[list[float]], answers: list[list[float]]) -> dict[str, float]:
        return usual(original, answers) | ({} if answers is original else {"other": figure})

    monkeypatch.setattr(Rounding, "agreement", agreement)
    engine, _ = load(engine=Rounding)
    assert (engine.facts.runtime, engine.facts.precision) == ("torch", "fp32")
    assert engine.facts.quality["metrics"]["other"] is None
    assert "other is not a number" in engine.facts.fallback_reason
    json.dumps(asdict(engine.facts), allow_nan=False)


def test_a_way_that_fails_is_refused_and_another_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the model's answer is not a number")

    monkeypatch.setattr(OpenVinoForward, "__call__", fail)
    engine, _ = load(replace(SPEC, precision="int8"))
    assert (engine.facts.runtime, engine.facts.precision) == ("torch", "int8")
    assert engine.facts.quality["verdict"] in ("kept", "warned")


def test_the_gate_tells_orders_apart_where_scores_are_all_one() -> None:
    logits = np.array([22.0, 22.4, 30.5, 19.0], np.float32)
    tokens = np.ones(4, np.int32)
    same, other = (Scores(each, tokens) for each in (logits, 50 - logits))
    assert Reranker.agreement([same], [same])["spearman"] == 1
    figures = Reranker.agreement([same], [other])
    assert figures["spearman"] == -1
    assert figures["same_first"] == 0


def test_another_engine_under_the_same_name_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own engine may change while model and machine stay the same."""
    monkeypatch.syspath_prepend(str(tmp_path))
    code = "from tests.rounding import Rounding\n\nclass Own(Rounding):\n    pass\n"
    seen = []
    for version in ("", "# changed\n", "# changed\n"):
        (tmp_path / "own_engine.py").write_text(code + version, encoding="utf-8")
        sys.modules.pop("own_engine", None)
        own = importlib.import_module("own_engine").Own
        seen.append(measured(load(engine=own)[1]))
    assert seen == [True, True, False]


def test_other_weights_in_files_of_the_same_size_and_time_are_measured_anew(tmp_path: Path) -> None:
    """As where an installer sets all times to the same."""
    folder = checkpoints.copy(CROSS, tmp_path / "cross")
    assert measured(load(engine=Rounding, folder=folder)[1])
    shard = sorted(folder.glob("*.safetensors"))[0]
    before, content = shard.stat(), bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert measured(load(engine=Rounding, folder=folder)[1])


def test_figures_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 9, 64).astype(float), rng.integers(0, 9, 64).astype(float)
    assert calibration.spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert calibration.spearman(first, np.ones(64)) == 0
    rows = rng.normal(size=(40, 8))
    turned = np.where(np.arange(40)[:, None] < 4, -rows, rows)
    assert calibration.cosine(rows, rows) == pytest.approx(1)
    assert calibration.cosine(rows, turned) < 0
