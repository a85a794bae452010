"""Finds the file at fault when a checkpoint can't be loaded: the loaders' own errors rarely name it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoTokenizer

from deployments.checkpoints.files import CONFIG
from deployments.checkpoints.modules import transformer_folders, weighted_folders
from deployments.spec import CheckpointError, first_line

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
ADVICE = re.compile(r"(?<=\.) (If you were trying to load it|This could be because).*")
"""What the loaders go on to say about a hub and about versions."""


def fault(folder: Path, error: Exception) -> CheckpointError:
    """The error that says what is wrong with the checkpoint in `folder`, which could not be loaded."""
    for part in transformer_folders(folder):
        for read in (config_of, _tokenizer_of, _empty_model):
            try:
                read(part)
            except CheckpointError as found:
                return found
    for part in weighted_folders(folder):
        for path in sorted(part.glob("pytorch_model*.bin")):
            try:
                _pickle(path)
            except CheckpointError as found:
                return found
    return CheckpointError(f"the checkpoint in {folder} can't be read: {said(error)}")


def config_of(folder: Path) -> Any:
    """transformers' config of the model in `folder`. Raises CheckpointError if it can't be read."""
    return _read(f"{folder / CONFIG} can't be used", lambda: AutoConfig.from_pretrained(folder, **LOCAL))


def said(error: Exception) -> str:
    """One line of what an error says."""
    if isinstance(error, StrictDataclassError):
        return str(error).strip().rpartition("\n")[2].strip().removeprefix("TypeError: ").removeprefix("ValueError: ")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    more = f" {lines[1]}" if len(lines) > 1 and lines[0].endswith(":") else ""  # the first only announces it
    return ADVICE.sub("", first_line(error)) + more


def _tokenizer_of(folder: Path) -> Any:
    return _read(
        f"the tokenizer in {folder} (tokenizer.json, tokenizer_config.json) can't be used",
        lambda: AutoTokenizer.from_pretrained(folder, **LOCAL),
    )


def _empty_model(folder: Path) -> Any:
    """The model without weights, which costs neither time nor memory."""
    with torch.device("meta"):
        return _read(
            f"{folder / CONFIG} describes a model that can't be built",
            lambda: AutoModel.from_config(config_of(folder), trust_remote_code=False),
        )


def _pickle(path: Path) -> None:
    try:
        found = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors ({type(error).__name__}); save the model as safetensors"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(found).__name__}, not tensors by name")


def _read(what: str, attempt: Callable[[], Any]) -> Any:
    try:
        return attempt()
    except CheckpointError:
        raise
    except Exception as error:  # whatever a loader raises, the file is at fault
        raise CheckpointError(f"{what}: {said(error)}") from error
