"""Knows which files of a checkpoint's folder are read on load, and checks that they are readable.

The folder may hold other files: training data, another system's metadata, the same weights for another runtime.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path, PurePosixPath
from typing import Any

from deployments import disk_cache
from deployments.spec import CheckpointError

MODULES = "modules.json"
"""List of sentence-transformers' modules: https://sbert.net/docs/sentence_transformer/usage/custom_models.html."""
ADAPTER = "adapter_config.json"
JSON = (
    *("config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("preprocessor_config.json", "processor_config.json", "chat_template.json"),
    *(MODULES, "config_sentence_transformers.json", "router_config.json"),
    *("wordembedding_config.json", "whitespacetokenizer_config.json"),
    *(f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert")),
    *("sentence_xlm-roberta_config.json", "sentence_xlnet_config.json"),
)
READ = (*JSON, "vocab.txt", "merges.txt", "*.model", "*.jinja", "model*.safetensors", "pytorch_model*.bin")


def check(folder: Path) -> None:
    """Raises CheckpointError naming a damaged JSON file, or if the folder holds an adapter without its model."""
    for part in folders(folder):
        for name in JSON:
            if (part / name).is_file():
                read_json(part / name)
    weights = encoder_folder(folder)
    if (weights / ADAPTER).is_file() and not (weights / "config.json").is_file():
        adapter = read_json(weights / ADAPTER)
        raise CheckpointError(
            f"{weights} has no model, only an adapter ({adapter.get('peft_type', 'of PEFT')}) for "
            f"{adapter.get('base_model_name_or_path', 'a model')}; merge it into that model (PEFT's merge_and_unload) "
            "and serve the result"
        )


def folders(folder: Path) -> list[Path]:
    """The folder itself and the folders of sentence-transformers' modules."""
    return [folder, *dict.fromkeys(folder / module["path"] for module in modules(folder) if module["path"])]


def encoder_folder(folder: Path) -> Path:
    """The folder of a model's config and weights: with sentence-transformers, its first module's folder."""
    first = modules(folder)[:1]
    return folder / first[0]["path"] if first else folder


def is_static(folder: Path) -> bool:
    """Whether the model is a table of embeddings, which has no config.json."""
    return any(module["type"].endswith(".StaticEmbedding") for module in modules(folder)[:1])


def modules(folder: Path) -> list[dict[str, str]]:
    """sentence-transformers' modules, each with `type` and `path`; none if the folder has no `modules.json`.

    Raises CheckpointError if the list is damaged or leads out of the folder.
    """
    path = folder / MODULES
    if not path.is_file():
        return []
    listed = read_json(path)
    try:
        found = [{"type": str(module["type"]), "path": str(module["path"])} for module in listed]
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is not a list of modules with `type` and `path`") from error
    for module in found:
        inside = PurePosixPath(module["path"])
        if inside.is_absolute() or ".." in inside.parts:
            raise CheckpointError(f"{path}: the path {module['path']!r} leads out of the folder")
    return found


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that is read, by name. It identifies the model."""
    found = {path for part in folders(folder) for pattern in READ for path in part.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): disk_cache.digest(path) for path in sorted(found)}


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises CheckpointError naming the file and what is wrong with it."""
    content = path.read_bytes()
    if content.startswith(codecs.BOM_UTF8):
        raise CheckpointError(f"{path} begins with a byte order mark; save it as UTF-8 without one")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
