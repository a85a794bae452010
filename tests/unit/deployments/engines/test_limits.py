"""A checkpoint's own limits bound every input: what is too long is cut, what the model has no place for is refused."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForSequenceClassification,
    CanineConfig,
    CanineModel,
    IBertConfig,
    IBertModel,
    PreTrainedTokenizerFast,
)

from deployments.batching.runner import Runner
from deployments.engine_loading import load_engine
from deployments.load_progress import LoadProgress
from deployments.memory import CpuMemory
from deployments.messages import Pair, Prompt, Text
from deployments.spec import CheckpointError, ItemError
from serve.config.tasks import model_spec
from tests import checkpoints

LONG = "The deposit is returned within 14 days. " * 120
FP32: dict[str, Any] = {"dtype": torch.float32}
RUNTIMES = ["torch", "openvino"]


def load(task: str, folder: Path, runtime: Any = "torch", **more: Any) -> Any:
    spec = model_spec("m", task, str(folder), precision="fp32", runtime=runtime, threads=1, **more)
    return load_engine(spec, LoadProgress(lambda _: None))


def vectors(engine: Any, *texts: str) -> np.ndarray:
    found: np.ndarray = engine.run([engine.prepare(Text(text)) for text in texts]).vectors
    return found


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.roberta(tmp_path_factory.mktemp("roberta") / "embedder")


def reference(folder: Path, limit: int) -> SentenceTransformer:
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs=FP32)
    model.max_seq_length = limit
    return model


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_text_is_cut_at_what_the_position_table_holds(runtime: str, roberta: Path) -> None:
    """RoBERTa's 514 positions are for 512 tokens, and its tokenizer says nothing."""
    engine = load("embedding", roberta, runtime)
    texts = ["Falcon contract of tenant A", LONG, "", "rain " * 511, "rain"]
    assert engine.facts.runtime == runtime
    assert np.allclose(vectors(engine, *texts), reference(roberta, 512).encode(texts), atol=1e-4)
    assert np.allclose(vectors(engine, LONG)[0], reference(roberta, 512).encode(LONG), atol=1e-4)
    with pytest.raises(ItemError, match="more than the 512 tokens"):
        engine.prepare(Text(LONG, truncate=False))
    with pytest.raises(ItemError, match="more than the 512 tokens"):
        engine.prepare(Text([7] * 513, truncate=False))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("positions", "padding", "limit"), [(66, 1, 64), (40, 0, 39), (50, 5, 44)])
def test_positions_begin_after_the_padding_id(
    runtime: str, positions: int, padding: int, limit: int, tmp_path: Path
) -> None:
    folder = checkpoints.roberta(tmp_path / "model", positions=positions, pad_token_id=padding)
    engine = load("embedding", folder, runtime)
    assert len(engine.prepare(Text(LONG)).ids) == limit
    assert np.allclose(vectors(engine, LONG, "rain"), reference(folder, limit).encode([LONG, "rain"]), atol=1e-4)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_pairs_are_cut_at_it_too(runtime: str, tmp_path: Path) -> None:
    folder = checkpoints.roberta(tmp_path / "cross", scores=True)
    engine = load("rerank", folder, runtime)
    pairs = [("deposit", LONG), (LONG, LONG), ("deposit", ""), (LONG, "deposit"), ("rain", "It rains.")]
    model = CrossEncoder(str(folder), device="cpu", max_length=512, model_kwargs=FP32)
    expected = [model.predict(pair, activation_fn=torch.nn.Identity()) for pair in pairs]
    found = engine.run([engine.prepare(Pair(*pair)) for pair in pairs]).logits
    assert np.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_token_without_an_embedding_is_refused_and_its_neighbours_are_answered(runtime: str, tmp_path: Path) -> None:
    folder = checkpoints.with_added_token(checkpoints.MINILM, tmp_path / "added", "[CUSTOMER]")
    engine = load("embedding", folder, runtime)
    with pytest.raises(ItemError, match=r"\[CUSTOMER\].*no embedding: there are 30522"):
        engine.prepare(Text("[CUSTOMER] wants a refund"))
    with pytest.raises(ItemError, match="not among the model's 30522"):
        engine.prepare(Text([101, 30522, 102]))
    assert vectors(engine, "A customer wants a refund").shape == (1, 384)


def test_a_prompt_with_a_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.with_added_token(checkpoints.NEXT_WORD, tmp_path / "added", "<고객>")
    engine = load("next_word", folder)
    with pytest.raises(ItemError, match=r"<고객>.*no embedding"):
        engine.prepare(Prompt("<고객> 오늘"))
    [words] = engine.run([engine.prepare(Prompt("오늘 날씨가"))])
    assert words


@pytest.mark.parametrize("positions", [64, 20, 10])
def test_a_prompt_is_cut_where_words_still_have_room_to_grow(positions: int, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    model = AutoModelForCausalLM.from_pretrained(checkpoints.NEXT_WORD, dtype=torch.float32)
    model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight[:positions].clone())
    model.config.n_positions = positions
    checkpoints.copy(checkpoints.NEXT_WORD, folder, "model*")
    model.save_pretrained(folder)
    engine = load("next_word", folder)
    item = engine.prepare(Prompt("오늘 날씨가 좋아서 산책을 갔다 " * 40, top_k=50))
    assert len(item.ids) == positions - 9
    [words] = engine.run([item])
    assert words


def test_a_model_with_no_room_for_a_word_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    model = AutoModelForCausalLM.from_pretrained(checkpoints.NEXT_WORD, dtype=torch.float32)
    model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight[:8].clone())
    model.config.n_positions = 8
    checkpoints.copy(checkpoints.NEXT_WORD, folder, "model*")
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="8 positions"):
        load("next_word", folder)


def test_segments_that_the_model_does_not_have_are_refused_at_load(tmp_path: Path) -> None:
    folder = checkpoints.roberta(tmp_path / "klue", scores=True, pad_token_id=0, type_vocab_size=1)
    checkpoints.edit(folder / "tokenizer_config.json", model_input_names=None)
    with pytest.raises(CheckpointError, match="type_vocab_size 1"):
        load("rerank", folder)
    alone = checkpoints.roberta(tmp_path / "embedder", pad_token_id=0, type_vocab_size=1)
    checkpoints.edit(alone / "tokenizer_config.json", model_input_names=None)
    expected = reference(alone, 513).encode(["rain", "It rains."])
    assert np.allclose(vectors(load("embedding", alone), "rain", "It rains."), expected, atol=1e-4)


def test_a_model_without_a_limit_takes_no_more_than_a_batch_holds(tmp_path: Path) -> None:
    static = load("embedding", checkpoints.static(tmp_path / "static"))
    assert static.cost(static.prepare(Text("rain " * 3000))) == 128
    with pytest.raises(ItemError, match="more than the 128 tokens"):
        static.prepare(Text("rain " * 129, truncate=False))
    assert static.cost(static.prepare(Text("rain " * 128, truncate=False))) == 128
    bounded = load("embedding", checkpoints.roberta(tmp_path / "roberta"), max_batch_tokens=100)
    assert len(bounded.prepare(Text(LONG)).ids) == 100


@pytest.mark.parametrize("threads", [1, 2])
def test_no_client_gets_anothers_answer_whatever_impossible_items_are_sent(threads: int, roberta: Path) -> None:
    spec = model_spec("m", "embedding", str(roberta), precision="fp32", runtime="openvino", threads=threads)
    engine: Any = load_engine(spec, LoadProgress(lambda _: None))
    model = reference(roberta, 512)
    texts = [f"contract number {number} of tenant {number % 7}" for number in range(48)]
    texts[::5] = [f"{text} {LONG}" for text in texts[::5]]
    expected = model.encode(texts)
    impossible = [Text([40_000]), Text([-1]), Text(LONG, truncate=False), Text([7] * 600, truncate=False)]
    wrong: list[str] = []

    def client(number: int) -> None:
        runner = Runner(engine, CpuMemory())
        for start in range(number, 48, 6):
            batch = [Text(texts[start]), impossible[start % 4], Text(texts[(start + 3) % 48])]
            items = []
            for request in batch:
                try:
                    items.append(engine.prepare(request))
                except ItemError:
                    continue
            [(_, found)] = runner.run(items).pieces
            for row, place in zip(found.vectors, (start, (start + 3) % 48), strict=True):
                if not np.allclose(row, expected[place], atol=1e-3):
                    wrong.append(texts[place])

    clients = [threading.Thread(target=client, args=(number,)) for number in range(threads)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    assert not wrong


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_weights_that_are_no_numbers_are_never_an_answer(runtime: Any, tmp_path: Path) -> None:
    def spoilt(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
        weights[name][0, 0] = torch.nan
        return weights

    folder = checkpoints.with_weights(checkpoints.MINILM, tmp_path / "spoilt", spoilt)
    with pytest.raises((CheckpointError, RuntimeError), match=r"not a number|fails on"):
        load("embedding", folder, runtime).warm_up()


@pytest.mark.parametrize(
    "settings",
    [
        {"query_length": 8},
        {"document_length": 12},
        {"processing_kwargs": {"text": {"max_length": 12}}},
        {"processing_kwargs": {"text": {"add_special_tokens": False}}},
    ],
)
def test_a_checkpoints_own_settings_for_texts_are_heeded(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = checkpoints.with_prompts(tmp_path / "model", {})
    checkpoints.edit(folder / "sentence_bert_config.json", **settings)
    model, engine = SentenceTransformer(str(folder), device="cpu"), load("embedding", folder, "torch")
    text = "The deposit is returned within 14 days. " * 9
    kinds: list[tuple[Any, np.ndarray]] = [
        (None, model.encode([text])),
        ("query", model.encode_query([text])),
        ("document", model.encode_document([text])),
    ]
    for input_type, expected in kinds:
        found = engine.run([engine.prepare(Text(text, input_type=input_type))]).vectors
        assert np.allclose(found, expected, atol=1e-4)


def test_graphs_of_folders_that_differ_in_an_old_limit_are_not_shared(tmp_path: Path) -> None:
    found = []
    for limit in (16, 100):
        folder = checkpoints.with_prompts(tmp_path / str(limit), {})
        (folder / "sentence_bert_config.json").unlink(missing_ok=True)
        (folder / "sentence_roberta_config.json").write_text(json.dumps({"max_seq_length": limit}), encoding="utf-8")
        found.append(len(load("embedding", folder, "openvino").prepare(Text("a " * 300)).ids))
    assert found == [16, 100]


def test_a_quantised_table_of_embeddings_bounds_ids_too(tmp_path: Path) -> None:
    """I-BERT's tables are no nn.Embedding."""
    folder = checkpoints.roberta(tmp_path / "model")
    torch.manual_seed(1)
    sizes = {"vocab_size": 30522, "max_position_embeddings": 66, "type_vocab_size": 2, "pad_token_id": 1}
    IBertModel(IBertConfig(**checkpoints.TINY | sizes)).save_pretrained(folder)
    engine = load("embedding", folder)
    assert np.allclose(vectors(engine, LONG, "rain"), reference(folder, 64).encode([LONG, "rain"]), atol=1e-4)
    with pytest.raises(ItemError, match="token id 30522 is not among the model's 30522"):
        engine.prepare(Text([30522]))


def test_a_model_without_a_table_of_embeddings_takes_any_id(tmp_path: Path) -> None:
    """CANINE hashes characters."""
    folder = checkpoints.roberta(tmp_path / "model")
    torch.manual_seed(1)
    CanineModel(CanineConfig(**checkpoints.TINY, max_position_embeddings=512)).save_pretrained(folder)
    engine = load("embedding", folder)
    assert np.allclose(vectors(engine, "It rains."), reference(folder, 512).encode(["It rains."]), atol=1e-4)


def test_a_head_that_reads_the_token_that_ends_a_text_scores_pairs(tmp_path: Path) -> None:
    """BART's heads fail on ids without it."""
    folder = tmp_path / "model"
    sizes = {"d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    tokens = {"vocab_size": 400, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "num_labels": 1}
    torch.manual_seed(1)
    BartForSequenceClassification(BartConfig(**sizes, **heads, **tokens, init_std=0.2)).save_pretrained(folder)
    tokenizer = checkpoints.roberta_pairs(checkpoints.byte_level("<s>", "<pad>", "</s>"))
    named = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "model_max_length": 64}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    pairs = [("rain", "It rains."), ("rain", "The deposit is returned."), ("deposit", LONG)]
    model = CrossEncoder(str(folder), device="cpu", model_kwargs=FP32)
    expected = [model.predict(pair, activation_fn=torch.nn.Identity()) for pair in pairs]
    engine = load("rerank", folder)
    assert np.allclose(engine.run([engine.prepare(Pair(*pair)) for pair in pairs]).logits, expected, atol=1e-4)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_limit_that_no_text_fits_in_is_refused(runtime: str, tmp_path: Path) -> None:
    folder = checkpoints.small_bert(tmp_path / "model")
    with pytest.raises(CheckpointError, match="takes 2 tokens and needs 3"):
        load("embedding", folder, runtime, max_batch_tokens=2)
    assert vectors(load("embedding", folder, runtime, max_batch_tokens=3), "rain", LONG).shape[0] == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_max_length": 0}, "tokenizer_config.json: model_max_length"),
        ({"pad_token": "[AFAR]"}, "the padding token '[AFAR]'"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_model_is_named(changes: Any, said: str, tmp_path: Path) -> None:
    folder = checkpoints.small_bert(tmp_path / "model")
    checkpoints.edit(folder / "tokenizer_config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        load("embedding", folder)
    assert said in str(caught.value)
