"""Folders of sentence-transformers' modules: served with its numbers, or refused in one line that says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    LSTM,
    BoW,
    CLIPModel,
    Pooling,
    StaticEmbedding,
    WeightedLayerPooling,
    WordEmbeddings,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from tokenizers import Tokenizer, processors
from transformers import CLIPConfig, CLIPImageProcessor, PreTrainedTokenizerFast
from transformers import CLIPModel as TwoTowers

from deployments.checkpoints.footprint import footprint
from deployments.engine_loading import load_engine
from deployments.load_progress import LoadProgress
from deployments.messages import Text
from deployments.spec import CheckpointError, ItemError
from serve.config.tasks import model_spec
from tests import checkpoints

TEXTS = ["The deposit is returned within 14 days.", "It rains.", "", "rain in april " * 60]
WIDTH = checkpoints.TINY["hidden_size"]
WORDS = ["deposit", "returned", "rain", "april", "days", "it"]


def load(task: str, folder: Path) -> Any:
    return load_engine(model_spec("m", task, str(folder), precision="fp32", runtime="torch"), LoadProgress(lambda _: 0))


def refusal(task: str, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(task, folder)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    return said


def bert(folder: Path) -> Any:
    return Transformer(str(checkpoints.small_bert(folder.with_name(f"{folder.name}_bert"))))


def glove() -> Any:
    table = np.random.default_rng(0).normal(size=(len(WORDS), 24)).astype(np.float32)
    return WordEmbeddings(WhitespaceTokenizer(WORDS, stop_words=[], do_lower_case=True), table)


def static(width: int = 24) -> Any:
    torch.manual_seed(3)
    return StaticEmbedding(Tokenizer.from_file(str(checkpoints.MINILM / "tokenizer.json")), embedding_dim=width)


def clip(folder: Path) -> Any:
    """CLIP with towers for texts and images, as its own module, which newer versions no longer write."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    texts = shape | ends | {"vocab_size": 400, "max_position_embeddings": 77, "projection_dim": 32}
    images = shape | {"image_size": 32, "patch_size": 8, "projection_dim": 32}
    torch.manual_seed(1)
    inside = folder.with_name(f"{folder.name}_clip")
    TwoTowers(CLIPConfig(text_config=texts, vision_config=images, projection_dim=32)).save_pretrained(inside)
    tokenizer = checkpoints.byte_level("<pad>", "<s>", "</s>")
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    specials = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "model_max_length": 77}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(inside)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(inside)
    return CLIPModel(str(inside))


LAYOUTS: dict[str, Callable[[Path], list[Any]]] = {
    "routes": lambda at: [Router.for_query_document([static(WIDTH)], [bert(at), Pooling(WIDTH)]), Normalize()],
    "words": lambda at: [glove(), Pooling(24), Dense(24, 8), Normalize()],
    "words and LSTM": lambda at: [glove(), LSTM(24, 16), Pooling(32)],
    "words and CNN": lambda at: [glove(), CNN(24, 16), Pooling(48)],
    "bag of words": lambda at: [BoW(WORDS, {"rain": 2.0}), Dense(len(WORDS), 4)],
    "table": lambda at: [static(), Dense(24, 8), Normalize()],
    "CLIP": lambda at: [clip(at)],
    "layers": lambda at: [bert(at), WeightedLayerPooling(WIDTH, num_hidden_layers=2, layer_start=1), Pooling(WIDTH)],
    "dense in the middle": lambda at: [bert(at), Pooling(WIDTH), Normalize(), Dense(WIDTH, 16), Normalize()],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_modules_are_served_with_the_references_numbers(name: str, tmp_path: Path) -> None:
    folder = checkpoints.of_modules(tmp_path / "model", *LAYOUTS[name](tmp_path / "model"))
    reference = SentenceTransformer(str(folder), device="cpu")
    expected = np.stack([reference.encode(text) for text in TEXTS])
    engine = load("embedding", folder)
    assert np.allclose(engine.run([engine.prepare(Text(text)) for text in TEXTS]).vectors, expected, atol=1e-5)
    assert footprint(model_spec("m", "embedding", str(folder)), folder).activations > 0 or name == "bag of words"


def test_a_table_may_lie_in_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = checkpoints.of_modules(tmp_path / "model", static())
    (folder / "0_Table").mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.move(folder / name, folder / "0_Table" / name)
    with_modules(folder, 0, path="0_Table")
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    engine = load("embedding", folder)
    assert np.allclose(engine.run([engine.prepare(Text(text)) for text in TEXTS]).vectors, expected, atol=1e-5)


def test_a_text_too_long_for_clip_is_cut_or_refused(tmp_path: Path) -> None:
    engine = load("embedding", checkpoints.of_modules(tmp_path / "model", clip(tmp_path / "model")))
    engine.prepare(Text("rain " * 300))
    engine.prepare(Text("rain", truncate=False))
    with pytest.raises(ItemError, match="more than the 77 tokens"):
        engine.prepare(Text("rain " * 300, truncate=False))


def test_each_route_has_the_limit_of_its_own_module(tmp_path: Path) -> None:
    short = bert(tmp_path / "model")
    short.max_seq_length = 16
    words = glove()
    words.max_seq_length = 5
    routes = [Router.for_query_document([words, Pooling(24), Dense(24, WIDTH)], [short, Pooling(WIDTH)])]
    folder = checkpoints.of_modules(tmp_path / "model", *routes)
    model = SentenceTransformer(str(folder), device="cpu")
    engine = load("embedding", folder)
    for input_type, limit in (("query", 5), ("document", 16)):
        found = engine.run([engine.prepare(Text("rain " * 50, input_type=input_type))]).vectors
        assert np.allclose(found, model.encode(["rain " * 50], task=input_type), atol=1e-5)
        engine.prepare(Text("rain", input_type=input_type, truncate=False))
        with pytest.raises(ItemError, match=f"more than the {limit} tokens"):
            engine.prepare(Text("rain " * 50, input_type=input_type, truncate=False))


def test_a_text_beyond_the_position_table_is_cut_whatever_modules_follow(tmp_path: Path) -> None:
    encoder = Transformer(str(checkpoints.roberta(tmp_path / "roberta")))
    width = encoder.get_embedding_dimension()
    layers = WeightedLayerPooling(width, num_hidden_layers=encoder.config.num_hidden_layers, layer_start=1)
    engine = load("embedding", checkpoints.of_modules(tmp_path / "model", encoder, layers, Pooling(width)))
    assert engine.max_tokens == 512
    assert np.isfinite(engine.run([engine.prepare(Text("rain " * 2000))]).vectors).all()


def test_only_the_first_dimensions_are_given_if_the_checkpoint_says_so(tmp_path: Path) -> None:
    for name, first in (("tokens", [bert(tmp_path / "a"), Pooling(WIDTH)]), ("table", [static()])):
        folder = checkpoints.of_modules(tmp_path / name, *first)
        checkpoints.edit(folder / "config_sentence_transformers.json", truncate_dim=16)
        engine = load("embedding", folder)
        found = engine.run([engine.prepare(Text(text)) for text in TEXTS]).vectors
        assert found.shape == (4, 16)
        assert np.allclose(found, SentenceTransformer(str(folder), device="cpu").encode(TEXTS), atol=1e-5)


def with_modules(folder: Path, place: int, **changes: str) -> None:
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    modules[place] |= changes
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (lambda at: [bert(at)], r"(Transformer) give no sentence_embedding"),
        (lambda at: [bert(at), Normalize()], r"(Transformer, Normalize) give no sentence_embedding"),
        (lambda at: [bert(at), LSTM(WIDTH, 16), Pooling(32)], "do not run together: KeyError: 'sentence_lengths'"),
        (lambda at: [Router({"query": [static()]}, allow_empty_key=False)], "has no default route"),
    ],
)
def test_modules_that_do_not_fit_together_are_named(modules: Any, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    checkpoints.of_modules(folder, *modules(folder))
    assert said in refusal("embedding", folder)


def test_a_table_is_no_last_module(tmp_path: Path) -> None:
    folder = checkpoints.of_modules(tmp_path / "model", bert(tmp_path / "model"), Pooling(WIDTH))
    checkpoints.of_modules(folder / "2_Table", static())
    listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    listed.append({"name": "2", "path": "2_Table", "type": "sentence_transformers.models.StaticEmbedding"})
    (folder / "modules.json").write_text(json.dumps(listed), encoding="utf-8")
    assert "(Transformer, Pooling, StaticEmbedding) do not run together" in refusal("embedding", folder)


@pytest.mark.parametrize(
    "make",
    [
        checkpoints.in_a_subfolder,
        checkpoints.static,
        lambda folder: checkpoints.of_modules(folder, BoW(WORDS)),
        lambda folder: checkpoints.of_modules(folder, glove(), Pooling(24)),
    ],
)
def test_an_embedder_asked_to_rerank_is_called_an_embedder(make: Any, tmp_path: Path) -> None:
    said = refusal("rerank", make(tmp_path / "model"))
    assert "not the CrossEncoder" in said
    assert "an embedder; serve it with the task embedding" in said


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = checkpoints.of_modules(tmp_path / "model", bert(tmp_path / "model"), Pooling(WIDTH), Dense(WIDTH, 8))
    for part, name in (("1_Pooling", "Pooling"), ("2_Dense", "Dense")):
        shutil.move(folder / part, tmp_path / part)
        assert f"no config.json in {folder / part}, from which the module {name}" in refusal("embedding", folder)
        shutil.move(tmp_path / part, folder / part)
    (folder / "2_Dense/model.safetensors").unlink()
    assert f"no weights in {folder / '2_Dense'}" in refusal("embedding", folder)


ONE = "sentence_transformers.models.Transformer"


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ([], "lists no modules"),
        (None, "valid list"),
        ({}, "valid list"),
        ("x", "valid list"),
        ([1], "modules.json: 0: must be a JSON object"),
        ([{"name": "0", "path": ""}], "0.type: Field required"),
        ([{"name": "0", "path": None, "type": ONE}], "0.path: Input should be a valid string"),
        ([{"name": "0", "path": "../other", "type": ONE}], "leads out of the folder"),
        ([{"name": "0", "path": "0_Gone", "type": ONE}], "no config.json in"),
        ([{"name": "0", "path": "", "type": "own_code.Encoder"}], "not part of sentence-transformers"),
        ([{"name": "0", "path": "", "type": "sentence_transformers.models.Nope"}], 'does not define a "Nope"'),
    ],
)
def test_a_damaged_list_of_modules_says_what_is_wrong(listed: Any, said: str, tmp_path: Path) -> None:
    folder = checkpoints.of_modules(tmp_path / "model", static())
    (folder / "modules.json").write_text(json.dumps(listed), encoding="utf-8")
    assert said in refusal("embedding", folder)


@pytest.mark.parametrize(
    ("routes", "said"),
    [
        ([], "router_config.json: must be a JSON object"),
        ({"types": {}}, "router_config.json: structure: Field required"),
        ({"types": {}, "structure": {"query": ["gone"]}}, "names 'gone', which `types` lacks"),
        ({"types": {".": "sentence_transformers.models.Router"}, "structure": {}}, "is the router's own"),
        ({"types": {"../x": ONE}, "structure": {"query": ["../x"]}}, "leads out of the folder"),
    ],
)
def test_damaged_routes_say_what_is_wrong(routes: Any, said: str, tmp_path: Path) -> None:
    folder = checkpoints.of_modules(tmp_path / "model", Router.for_query_document([static()], [static()]))
    (folder / "router_config.json").write_text(json.dumps(routes), encoding="utf-8")
    assert said in refusal("embedding", folder)
