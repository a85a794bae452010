"""Loads causal language models and their tokenizers."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from deployments.checkpoints.files import read_json
from deployments.checkpoints.loading import load_model
from deployments.load_progress import LoadProgress
from deployments.spec import CheckpointError, Facts, Precision, first_line

UNBOUNDED = 2**31 - 1
CAUSAL = ("ForCausalLM", "LMHeadModel")
"""Endings of the names of transformers' causal language models."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of the checkpoint. Raises CheckpointError if it has none, or one that can't be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust part raises plain Exceptions, and settings of wrong types raise any kind
        raise CheckpointError(f"the tokenizer in {folder} can't be read: {first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(f"there is no tokenizer.json in {folder}; save the tokenizer as a fast tokenizer")
    tokenizer.model_max_length = UNBOUNDED  # or it would warn of texts that are refused anyway
    return tokenizer


def load_causal_lm(folder: Path, precision: Precision, progress: LoadProgress) -> tuple[PreTrainedModel, Facts]:
    """The model, ready to run. Raises CheckpointError as `load_model` does, and for models of other kinds."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    others = [name for name in config.get("architectures") or [] if not name.endswith(CAUSAL)]
    if others:
        raise CheckpointError(f"chat needs a causal language model; the one in {folder} is a {others[0]}")
    build = functools.partial(AutoModelForCausalLM.from_pretrained, folder, local_files_only=True)
    return load_model(build, folder, precision, progress, _probed)


@torch.inference_mode()
def _probed(model: PreTrainedModel) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.arange(4)[None]).logits
    return logits
