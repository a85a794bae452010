"""Checks the files of a checkpoint before it is loaded, so that an error names the file and what to change."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field

from deployments.checkpoints.files import ADAPTER, CONFIG, JSON, MODULES, ROUTES, TEXTS, read_as, read_object
from deployments.checkpoints.modules import TRANSFORMERS, Module, folders, modules, settings, transformer_folders
from deployments.spec import CheckpointError

OWN = "sentence_transformers."
"""Modules of other packages are code that comes with a checkpoint, or that its config chooses."""
CONFIGURED = {
    **dict.fromkeys((*TRANSFORMERS, "Pooling", "Dense", "LayerNorm"), CONFIG),
    **dict.fromkeys(("WeightedLayerPooling", "BoW", "WordWeights"), CONFIG),
    **{"StaticEmbedding": "tokenizer.json", "WordEmbeddings": "wordembedding_config.json"},
    **{"Router": ROUTES, "CNN": "cnn_config.json", "LSTM": "lstm_config.json"},
}
"""The file that a module can't be loaded without, by its kind."""
SIZES = (
    *("vocab_size", "hidden_size", "d_model", "n_embd", "num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    *("encoder_layers", "num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"),
    "max_seq_length",
)
"""Settings of a transformer that must be at least 1. Their names differ from one architecture to another."""


class Made(BaseModel):
    """What is read of a transformer's config before transformers checks it."""

    architectures: list[str] | None = None


class Tokenizer(BaseModel):
    """What transformers does not check of a tokenizer's config."""

    model_max_length: float | None = Field(None, ge=1)


def check(folder: Path) -> None:
    """Raises CheckpointError naming a file that is missing, damaged or of the wrong shape, or an adapter."""
    for part in transformer_folders(folder):
        _check_adapter(part)
    for module in modules(folder):
        _check_module(module, folder)
    for part in folders(folder):
        for name in JSON:
            if name != MODULES and (part / name).is_file():
                read_object(part / name)
    settings(folder)
    for part in transformer_folders(folder):
        for name, shape in ((CONFIG, Made), ("tokenizer_config.json", Tokenizer)):
            if (part / name).is_file():
                read_as(part / name, shape)
        for name in (CONFIG, *TEXTS):
            _check_sizes(part / name)


def _check_module(module: Module, folder: Path) -> None:
    if not module.type.startswith(OWN):
        raise CheckpointError(
            f"{folder / MODULES} names the module {module.type!r}, which is not part of sentence-transformers; code of "
            "a checkpoint is not run, so use a model without it"
        )
    needed = CONFIGURED.get(module.kind)
    if needed and not (module.folder / needed).is_file():
        raise CheckpointError(
            f"there is no {needed} in {module.folder}, from which the module {module.kind} of {MODULES} is read; copy "
            "the folder again with all its files"
        )


def _check_adapter(folder: Path) -> None:
    if not (folder / ADAPTER).is_file():
        return
    adapter = read_object(folder / ADAPTER)
    kind, base = adapter.get("peft_type", "of PEFT"), adapter.get("base_model_name_or_path", "a model")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} has no model, only an adapter ({kind}) for {base}; merge it into that model (PEFT's "
            "merge_and_unload) and serve the result"
        )
    raise CheckpointError(
        f"{folder} has an adapter ({kind}) beside a model; merge it into the model (PEFT's merge_and_unload), or "
        f"remove {ADAPTER} to serve the model without it"
    )


def _check_sizes(path: Path) -> None:
    if not path.is_file():
        return
    config = read_object(path)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in SIZES:
            size = part.get(name)
            if isinstance(size, str) or (isinstance(size, int | float) and size < 1):
                raise CheckpointError(f"{path}: {name} is {size!r}; it must be a number of at least 1, without quotes")
