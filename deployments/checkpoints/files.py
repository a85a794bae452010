"""Which files of a checkpoint's folder are read on load, and how the JSON ones are read.

The folder may hold other files: training data, another system's metadata, the same weights for another runtime.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from deployments.spec import CheckpointError

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
MODULES = "modules.json"
ROUTES = "router_config.json"
SETTINGS = "config_sentence_transformers.json"
TEXTS = (
    *(f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert")),
    *("sentence_xlm-roberta_config.json", "sentence_xlnet_config.json"),
)
"""sentence-transformers' settings for tokenizing, under the names that its versions have given them."""
JSON = (
    *TEXTS,
    *(CONFIG, "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("preprocessor_config.json", "processor_config.json", "chat_template.json"),
    *(MODULES, SETTINGS, ROUTES, "cnn_config.json", "lstm_config.json"),
    *("wordembedding_config.json", "whitespacetokenizer_config.json", "phrasetokenizer_config.json"),
)
"""The JSON files that are read."""
READ = (*JSON, "vocab.txt", "merges.txt", "*.model", "*.jinja", "model*.safetensors", "pytorch_model*.bin")
"""Patterns of all files that are read."""

Shape = TypeVar("Shape")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises CheckpointError naming the file and what is wrong with it."""
    content = path.read_bytes()
    if content.startswith(codecs.BOM_UTF8):
        raise CheckpointError(f"{path} begins with a byte order mark; save it as UTF-8 without one")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object. Raises CheckpointError naming the file and what is wrong with it."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {json.dumps(found)[:40]}, but it must be a JSON object ({{...}})")
    return found


def read_as(path: Path, shape: type[Shape]) -> Shape:
    """Read a JSON file that must have this shape. Raises CheckpointError naming the file and the field at fault."""
    try:
        return TypeAdapter(shape).validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        wrong = "must be a JSON object ({...})" if first["type"] == "model_type" else first["msg"]
        raise CheckpointError(f"{path}: {where + ': ' if where else ''}{wrong}") from error
