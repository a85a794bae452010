"""Loads causal language models and their tokenizers, from a folder of transformers' or from a GGUF file."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from deployments.checkpoints.files import read_json
from deployments.checkpoints.loading import load_model
from deployments.load_progress import LoadProgress
from deployments.spec import CheckpointError, Facts, Precision, first_line


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of the checkpoint. Raises CheckpointError if it has none, or one that can't be read."""
    try:
        if path.is_file():
            # Not AutoTokenizer, which reads the whole file twice more for its config.
            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust part raises plain Exceptions, and settings of wrong types raise any kind
        raise CheckpointError(f"the tokenizer in {path} can't be read: {first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(f"there is no tokenizer.json in {path}; save the tokenizer as a fast tokenizer")
    return tokenizer


def load_causal_lm(path: Path, precision: Precision, progress: LoadProgress) -> tuple[PreTrainedModel, Facts]:
    """The model, ready to run. Blocks of a GGUF file are unpacked into plain weights.

    Raises CheckpointError as `load_model` does.
    """
    if path.is_file():
        with _quiet():
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            build = functools.partial(
                AutoModelForCausalLM.from_pretrained,
                path.parent,
                config=config,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
            )
            return load_model(build, path, precision, progress)
    masked = [name for name in _architectures(path) if not name.endswith(("ForCausalLM", "LMHeadModel"))]
    if masked:
        raise CheckpointError(f"chat needs a causal language model; the one in {path} is a {masked[0]}")
    build = functools.partial(AutoModelForCausalLM.from_pretrained, path, local_files_only=True)
    return load_model(build, path, precision, progress, _probed)


def _architectures(folder: Path) -> list[str]:
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return config.get("architectures") or []


@torch.inference_mode()
def _probed(model: PreTrainedModel) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.arange(4)[None]).logits
    return logits


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars on the terminal."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
