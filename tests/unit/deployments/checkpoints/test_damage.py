"""Damaged files of a checkpoint: one line that names the file, never an error of a library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from deployments.checkpoints.footprint import footprint
from deployments.engine_loading import load_engine
from deployments.load_progress import LoadProgress
from deployments.spec import CheckpointError
from serve.config.tasks import model_spec
from tests import checkpoints

WIDTH = checkpoints.TINY["hidden_size"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small embedder in which nothing is wrong."""
    at = tmp_path_factory.mktemp("whole")
    encoder = Transformer(str(checkpoints.small_bert(at / "bert")))
    return checkpoints.of_modules(at / "model", encoder, Pooling(WIDTH))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return checkpoints.copy(whole, tmp_path / "model")


def refusal(folder: Path, task: str = "embedding") -> str:
    spec = model_spec("m", task, str(folder), precision="fp32", runtime="torch")
    with pytest.raises(CheckpointError) as caught:
        load_engine(spec, LoadProgress(lambda _: None))
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize("content", ["null", "[]", '"text"', "5"])
@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json", "sentence_bert_config.json"],
)
def test_a_file_that_holds_no_object_says_what_it_holds(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content, encoding="utf-8")
    assert f"{folder / name} holds {content}, but it must be a JSON object" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a number of at least 1"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'; it must be a number"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_attention_heads": -1}, "num_attention_heads is -1"),
        ({"hidden_size": 50}, "can't be built: ValueError: The hidden size (50) is not a multiple"),
        ({"intermediate_size": "96"}, "Field 'intermediate_size' expected int, got str"),
        ({"hidden_act": "nope"}, "can't be built: KeyError: 'nope'"),
        ({"model_type": "nope"}, "has model type `nope` but Transformers does not recognize this architecture."),
        ({"model_type": []}, "can't be used: TypeError"),
        ({"architectures": 5}, "architectures: Input should be a valid list"),
    ],
)
def test_a_config_that_makes_no_model_says_what_to_change(changes: dict[str, Any], said: str, folder: Path) -> None:
    checkpoints.edit(folder / "config.json", **changes)
    assert f"{folder / 'config.json'}" in (found := refusal(folder))
    assert said in found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": []}, "prompts: Input should be a valid dictionary"),
        ({"prompts": {"query": 5}}, "prompts.query: Input should be a valid string"),
        ({"default_prompt_name": 5}, "default_prompt_name: Input should be a valid string"),
        ({"truncate_dim": -1}, "truncate_dim: Input should be greater than 0"),
    ],
)
def test_settings_of_a_wrong_type_are_named(changes: dict[str, Any], said: str, folder: Path) -> None:
    checkpoints.edit(folder / "config_sentence_transformers.json", **changes)
    assert f"config_sentence_transformers.json: {said}" in refusal(folder)


def test_prompts_that_are_null_are_named(folder: Path) -> None:
    (folder / "config_sentence_transformers.json").write_text('{"prompts": null}', encoding="utf-8")
    assert "prompts: Input should be a valid dictionary" in refusal(folder)


@pytest.mark.parametrize("limit", [0, -5, "a"])
def test_a_length_that_no_text_can_have_is_named(limit: Any, folder: Path) -> None:
    checkpoints.edit(folder / "sentence_bert_config.json", max_seq_length=limit)
    assert f"sentence_bert_config.json: max_seq_length is {limit!r}" in refusal(folder)


def without_words(folder: Path) -> None:
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    del document["model"]["vocab"]
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda at: (at / "tokenizer.json").unlink(), "knows no words, only special tokens; add the tokenizer.json"),
        (without_words, "knows no words, only special tokens"),
        (
            lambda at: (at / "tokenizer.json").write_text("{}", encoding="utf-8"),
            "can't be used: KeyError: 'added_tokens'",
        ),
        (lambda at: (at / "tokenizer.json").write_bytes(b"\xff\xfe\x00"), "tokenizer.json is not JSON"),
        (lambda at: checkpoints.edit(at / "tokenizer_config.json", tokenizer_class=5), "can't be used: AttributeError"),
        (lambda at: checkpoints.edit(at / "tokenizer_config.json", pad_token=5), "pad_token has to be either str"),
        (lambda at: checkpoints.edit(at / "tokenizer_config.json", model_max_length="a"), "model_max_length: Input"),
    ],
)
def test_a_damaged_tokenizer_is_named(damage: Callable[[Path], Any], said: str, folder: Path) -> None:
    damage(folder)
    found = refusal(folder)
    assert said in found
    assert "tokenizer" in found


@pytest.mark.parametrize(
    ("task", "source"), [("next_word", checkpoints.NEXT_WORD), ("vision", checkpoints.VISION)], ids=["words", "images"]
)
@pytest.mark.parametrize("changes", [{"pad_token": 5}, {"model_max_length": "a"}])
def test_other_tasks_name_a_damaged_tokenizer_too(task: str, source: Path, changes: Any, tmp_path: Path) -> None:
    folder = checkpoints.copy(source, tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(json.dumps(changes), encoding="utf-8")
    assert next(iter(changes)) in refusal(folder, task)


def with_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    changed = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])


def of_a_tensor(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    name = "embeddings.position_embeddings.weight"
    return lambda header: header | {name: header[name] | changes}


@pytest.mark.parametrize(
    "change",
    [
        lambda header: [],
        lambda header: None,
        lambda header: "text",
        lambda header: dict.fromkeys(header),
        of_a_tensor(data_offsets=None),
        of_a_tensor(data_offsets=[1]),
        of_a_tensor(data_offsets=["0", "4"]),
        of_a_tensor(data_offsets=[-4, 0]),
        of_a_tensor(data_offsets=[8, 4]),
        of_a_tensor(data_offsets=[0, 10**15]),
        of_a_tensor(shape=[1]),
        of_a_tensor(dtype="F7"),
    ],
)
def test_a_damaged_header_of_weights_is_named(change: Any, folder: Path) -> None:
    with_header(folder / "model.safetensors", change)
    said = f"{folder / 'model.safetensors'} is damaged or cut short"
    assert said in refusal(folder)
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        footprint(model_spec("m", "embedding", str(folder)), folder)


@pytest.mark.parametrize("size", [0, 4, 60, 100_000])
def test_weights_that_are_cut_short_are_named(size: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path} is damaged or cut short" in refusal(folder)


def test_a_pointer_of_git_lfs_is_called_one(folder: Path) -> None:
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", encoding="utf-8"
    )
    assert "is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"no pickle", [1, 2], torch.nn.Linear(2, 2)])
def test_a_damaged_pickle_is_named(content: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert f"{path} is damaged" in refusal(folder)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ([], "must be a JSON object"),
        ({"metadata": {}}, "weight_map: Field required"),
        ({"metadata": {}, "weight_map": None}, "weight_map: Input should be a valid dictionary"),
        ({"metadata": {}, "weight_map": {}}, "names no files"),
        ({"metadata": {}, "weight_map": {"a": 5}}, "weight_map.a: Input should be a valid string"),
        ({"metadata": {}, "weight_map": {"a": "gone.safetensors"}}, "lacks gone.safetensors, named in"),
        *(
            ({"metadata": {}, "weight_map": {"a": name}}, f"names the file {name!r}, which is not in its folder")
            for name in ("../x.safetensors", "/etc/passwd", "..", ".", "")
        ),
    ],
)
def test_a_damaged_index_is_named(index: Any, said: str, folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    found = refusal(folder)
    assert "model.safetensors.index.json" in found
    assert said in found


def test_an_adapter_beside_a_model_is_not_left_out(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}), encoding="utf-8")
    assert "an adapter (LORA) beside a model; merge it into the model" in refusal(folder)
    (folder / "adapter_config.json").write_text("[]", encoding="utf-8")
    assert "adapter_config.json holds [], but it must be a JSON object" in refusal(folder)
