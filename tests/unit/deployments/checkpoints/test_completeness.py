"""Loaded means loaded: weights that are missing or do not fit are an error that names them, and so is a wrong model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from deployments.engine_loading import load_engine
from deployments.load_progress import LoadProgress
from deployments.messages import Pair, Question, Text
from deployments.spec import CheckpointError
from serve.config.tasks import model_spec
from serve.services.adverts.verdicts import JUDGE, Judgement
from tests import checkpoints
from tests.unit.deployments.engines.test_engines import png

Weights = dict[str, torch.Tensor]


def load(task: str, folder: Path, **more: Any) -> Any:
    spec = model_spec("m", task, str(folder), **{"precision": "fp32", "runtime": "torch"} | more)
    return load_engine(spec, LoadProgress(lambda _: None))


def without(*endings: str) -> Any:
    return lambda weights: {name: tensor for name, tensor in weights.items() if not name.endswith(endings)}


def prefixed(prefix: str) -> Any:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def cut(name: str) -> Any:
    return lambda weights: weights | {name: weights[name][:-1].clone()}


@pytest.mark.parametrize(
    ("task", "source", "change", "said"),
    [
        ("embedding", checkpoints.MINILM, without("layer.3.output.dense.weight"), "layer.3.output.dense.weight"),
        ("embedding", checkpoints.MINILM, without("word_embeddings.weight"), "word_embeddings.weight"),
        ("embedding", checkpoints.MINILM, prefixed("auto_model."), "begin with 'auto_model.'"),
        ("embedding", checkpoints.MINILM, prefixed("student.bert."), "begin with 'student.bert.'"),
        ("rerank", checkpoints.CROSS, without("classifier.bias"), "classifier.bias"),
        ("rerank", checkpoints.CROSS, prefixed("model."), "begin with 'model.'"),
        ("next_word", checkpoints.NEXT_WORD, prefixed("kogpt2."), "begin with 'kogpt2.'"),
        ("next_word", checkpoints.NEXT_WORD, without("h.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias"),
        ("vision", checkpoints.VISION, without("multi_modal_projector.linear_1.weight"), "projector.linear_1.weight"),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_missing_weights_are_named(
    task: str, source: Path, change: Any, said: str, pickled: bool, tmp_path: Path
) -> None:
    folder = checkpoints.with_weights(source, tmp_path / "model", change, pickled)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        load(task, folder)


@pytest.mark.parametrize(
    ("task", "source", "name"),
    [
        ("embedding", checkpoints.MINILM, "encoder.layer.0.attention.self.query.weight"),
        ("rerank", checkpoints.CROSS, "bert.embeddings.word_embeddings.weight"),
        ("next_word", checkpoints.NEXT_WORD, "transformer.wpe.weight"),
    ],
)
def test_weights_of_another_shape_are_named_with_both_shapes(
    task: str, source: Path, name: str, tmp_path: Path
) -> None:
    folder = checkpoints.with_weights(source, tmp_path / "model", cut(name))
    with pytest.raises(CheckpointError, match=rf"{re.escape(name.split('.', 1)[1])} \[\d+(, \d+)?\] instead of \["):
        load(task, folder)


@pytest.mark.parametrize(("task", "key"), [("next_word", "n_layer"), ("rerank", "num_hidden_layers")])
@pytest.mark.parametrize("layers", [1, 9])
def test_more_or_fewer_layers_than_the_config_says_are_an_error(
    task: str, key: str, layers: int, tmp_path: Path
) -> None:
    source = {"next_word": checkpoints.NEXT_WORD, "rerank": checkpoints.CROSS}[task]
    folder = checkpoints.copy(source, tmp_path / "model")
    checkpoints.edit(folder / "config.json", **{key: layers})
    with pytest.raises(CheckpointError, match="more layers than its config" if layers == 1 else "lacks weights"):
        load(task, folder)


def test_a_pooler_that_nothing_depends_on_may_be_missing(tmp_path: Path) -> None:
    folder = checkpoints.with_weights(checkpoints.MINILM, tmp_path / "model", without("pooler.dense.weight"))
    expected = SentenceTransformer(str(checkpoints.MINILM), device="cpu").encode(["A lease."])
    engine = load("embedding", folder)
    assert np.allclose(engine.run([engine.prepare(Text("A lease."))]).vectors, expected, atol=1e-5)


def test_a_head_of_another_task_is_left_out(tmp_path: Path) -> None:
    """An encoder that was saved with a head for pairs or for masked words."""
    torch.manual_seed(0)
    config = BertConfig(**checkpoints.TINY, vocab_size=30522, max_position_embeddings=128)
    for model in (BertForMaskedLM(config), BertForSequenceClassification(config)):
        folder = tmp_path / type(model).__name__
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(checkpoints.MINILM / name, folder)
        model.save_pretrained(folder)
        expected = SentenceTransformer(str(folder), device="cpu").encode(["A lease."])
        engine = load("embedding", folder)
        assert np.allclose(engine.run([engine.prepare(Text("A lease."))]).vectors, expected, atol=1e-5)


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_a_model_without_a_head_is_no_reranker(runtime: str) -> None:
    with pytest.raises(CheckpointError, match=r"lacks weights.*classifier.*saved as BertModel"):
        load("rerank", checkpoints.MINILM, runtime=runtime)


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    told = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(told), encoding="utf-8")
    save_file({"base_model.x.lora_A.weight": torch.zeros(8, 4)}, folder / "adapter_model.safetensors")
    for task in ("embedding", "rerank", "next_word", "vision"):
        with pytest.raises(CheckpointError, match=r"adapter \(LORA\) for some/base; merge it"):
            load(task, folder)


@pytest.mark.parametrize("labels", [2, 3])
def test_a_classifier_is_no_reranker(labels: int, tmp_path: Path) -> None:
    folder = checkpoints.roberta(tmp_path / "model", scores=True, num_labels=labels)
    with pytest.raises(CheckpointError, match=f"one logit.* has {labels}"):
        load("rerank", folder)


def test_a_language_model_without_koreas_word_marks_is_no_predictor(tmp_path: Path) -> None:
    for folder in (checkpoints.gpt2(tmp_path / "gpt2"), checkpoints.gpt2(tmp_path / "padded", 56), checkpoints.MINILM):
        with pytest.raises(CheckpointError, match=r"next_word needs .* KoGPT2's tokenizer.*no tokens that begin with"):
            load("next_word", folder)


def test_a_tokenizer_without_the_token_that_ends_texts_is_no_predictors(tmp_path: Path) -> None:
    folder = checkpoints.copy(checkpoints.NEXT_WORD, tmp_path / "model")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace('"</s>"', '"<eos>"'), encoding="utf-8")
    with pytest.raises(CheckpointError, match="no token '</s>'"):
        load("next_word", folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer.json"):
        load("next_word", folder)


@pytest.mark.parametrize("chat", [False, True])
def test_language_models_rerank_as_the_cross_encoder_does(chat: bool, tmp_path: Path) -> None:
    folder = checkpoints.causal_reranker(tmp_path / "model", chat)
    model = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    pairs = [("deposit", "The deposit"), ("rain", ""), ("rain", "It rains. " * 300), ("q " * 900, "d"), ("a", "b")]
    expected = [model.predict(pair, activation_fn=torch.nn.Identity()) for pair in pairs]
    engine = load("rerank", folder)
    items = [engine.prepare(Pair(*pair)) for pair in pairs]
    assert np.allclose(engine.run(items).logits, expected, atol=1e-4)
    alone = np.concatenate([engine.run([item]).logits for item in items])
    assert np.allclose(alone, expected, atol=1e-4)


def test_a_language_model_without_yes_and_no_is_no_reranker(tmp_path: Path) -> None:
    folder = checkpoints.causal_reranker(tmp_path / "model", False)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8").replace('"yes"', '"yess"')
    document = json.loads(text)
    document["model"]["vocab"] = {
        ("oui" if token == "yess" else token): id for token, id in document["model"]["vocab"].items()
    }
    document["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(CheckpointError, match="yes"):
        load("rerank", folder)


@pytest.mark.parametrize("make", [checkpoints.static, checkpoints.in_a_subfolder])
def test_other_layouts_of_sentence_transformers_are_served(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    texts = ["A lease.", "두레는 마을의 품앗이다.", "word " * 300, ""]
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts)
    for precision in ("fp32", "auto"):
        engine = load("embedding", folder, precision=precision, runtime="auto")
        found = engine.run([engine.prepare(Text(text)) for text in texts]).vectors
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        assert ((found * expected).sum(1)[:3] / lengths[:3]).min() > (0.9999 if precision == "fp32" else 0.98)
        assert np.allclose(found, expected, atol=0.1)


@pytest.mark.parametrize("merged", [True, False])
def test_old_layouts_of_llava_take_what_they_lack_from_the_models_config(merged: bool, tmp_path: Path) -> None:
    folder = checkpoints.copy(checkpoints.VISION, tmp_path / "model")
    new = load("vision", checkpoints.VISION)
    known = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    lacking = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    known = {name: value for name, value in known.items() if name not in lacking}
    if merged:
        (folder / "processor_config.json").write_text(json.dumps(known), encoding="utf-8")
    else:
        image = known["image_processor"] | {"processor_class": "LlavaProcessor"}
        (folder / "preprocessor_config.json").write_text(json.dumps(image), encoding="utf-8")
        (folder / "processor_config.json").unlink()
    old = load("vision", folder)
    question = Question(png(Image.new("RGB", (90, 60), "red")), JUDGE, json.dumps(Judgement.model_json_schema()))
    assert old.run([old.prepare(question)])[0].json == new.run([new.prepare(question)])[0].json


def test_another_model_is_no_llava(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="vision needs a LLaVA"):
        load("vision", checkpoints.MINILM)


def test_files_that_loading_does_not_read_are_let_be(tmp_path: Path) -> None:
    folder = checkpoints.copy(checkpoints.MINILM, tmp_path / "model")
    (folder / "._config.json").write_bytes(b"\x00\x05\x16\x07" + b"\xb0" * 100)
    (folder / "train_samples.json").write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    (folder / "model.safetensors.index.json.bak").write_text("{broken", encoding="utf-8")
    assert load("embedding", folder)
    (folder / "1_Pooling/config.json").write_text("{broken", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"1_Pooling/config.json is not JSON"):
        load("embedding", folder)


def test_a_byte_order_mark_is_named(tmp_path: Path) -> None:
    folder = checkpoints.copy(checkpoints.CROSS, tmp_path / "model")
    config = folder / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    with pytest.raises(CheckpointError, match=r"config.json begins with a byte order mark"):
        load("rerank", folder)


def test_modules_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    for path in ("../elsewhere", "/etc"):
        folder = checkpoints.copy(checkpoints.MINILM, tmp_path / str(len(path)))
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        modules[0]["path"] = path
        (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
        with pytest.raises(CheckpointError, match="leads out of the folder"):
            load("embedding", folder)


def test_a_model_in_both_roles_keeps_its_own_graph_for_each(tmp_path: Path) -> None:
    """A cross-encoder's folder served as embedding and as rerank, in both orders."""
    both = checkpoints.roberta(tmp_path / "model", scores=True)
    for tasks in (("embedding", "rerank"), ("rerank", "embedding")):
        engines = {task: load(task, both, runtime="openvino") for task in tasks}
        rows = engines["embedding"].run([engines["embedding"].prepare(Text("rain"))]).vectors
        logits = engines["rerank"].run([engines["rerank"].prepare(Pair("rain", "It rains."))]).logits
        assert (rows.shape, logits.shape) == ((1, 48), (1,))
