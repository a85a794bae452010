"""Unpacks GGUF files into folders that transformers loads, once per file: unpacking takes far longer than loading."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

from deployments import disk_cache
from deployments.checkpoints.diagnosis import said
from deployments.checkpoints.modules import contents
from deployments.load_progress import LoadProgress
from deployments.spec import CheckpointError

EXACT_BYTES = 2**31
"""Files up to this size are unpacked to float32, which holds their values exactly; larger ones to bfloat16."""


def folder_of(path: Path) -> Path:
    """The folder in the cache on disk for the file's model."""
    return disk_cache.cache_folder() / f"gguf-{disk_cache.key(contents(path), disk_cache.versions())}"


def unpack(path: Path, _: LoadProgress) -> None:
    """Write the file's config, tokenizer and weights to `folder_of(path)`, unless they are there.

    Raises CheckpointError if the file can't be read, or the folder can't be written.
    """
    folder = folder_of(path)
    with disk_cache.alone(folder.name):
        if folder.is_dir():
            return
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=folder.parent, suffix=".part"))
        except OSError as error:
            raise CheckpointError(f"{path} can't be unpacked into {folder.parent} ($DURE_CACHE): {error}") from error
        try:
            _write(path, part)
            os.replace(part, folder)
        except MemoryError:
            raise
        except Exception as error:  # whatever a loader raises, the file is at fault, or the disk
            raise CheckpointError(
                f"{path} can't be unpacked into {folder.parent} ($DURE_CACHE): {said(error)}"
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _write(path: Path, folder: Path) -> None:
    # Not AutoTokenizer, and the config only once: each would read all of the file's lists again.
    PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        config=config,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32 if path.stat().st_size <= EXACT_BYTES else torch.bfloat16,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain now
    model.save_pretrained(folder)
