"""Unpacks GGUF files into folders that transformers loads, once per file: unpacking takes far longer than loading."""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import gguf as library
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast
from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

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


def sizes(path: Path) -> tuple[SimpleNamespace, int]:
    """The model's sizes, by the names of transformers' configs, and the number of its weights, from the file's header.

    Raises CheckpointError if it can't be read.
    """
    try:
        header = GgufHeader.from_file(str(path))
        known, _ = read_gguf_metadata(str(path))
        of = known["general.architecture"]
        config = SimpleNamespace(
            hidden_size=known[f"{of}.embedding_length"],
            intermediate_size=known[f"{of}.feed_forward_length"],
            vocab_size=known.get(f"{of}.vocab_size") or known["tokenizer.ggml.tokens"],
        )
    except Exception as error:  # a damaged header may raise anything
        raise CheckpointError(f"{path} can't be read: {said(error)}") from error
    return config, sum(math.prod(tensor.shape) for tensor in header.tensors)


def unpack(path: Path, _: LoadProgress) -> None:
    """Write the file's config, tokenizer and weights to `folder_of(path)`, unless they are there.

    Raises CheckpointError if the file can't be read, or the folder can't be written.
    """
    folder = folder_of(path)
    with disk_cache.alone(folder.name):
        if folder.is_dir():
            return
        part = folder.with_name(f"{folder.name}.part")
        try:
            shutil.rmtree(part, ignore_errors=True)  # what a process left that was killed
            part.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"{path} can't be unpacked into {folder.parent} ($DURE_CACHE): {error}") from error
        try:
            with _asked_once():
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


@contextmanager
def _asked_once() -> Iterator[None]:
    """The library answers again what transformers asks it again and again: of 34 s for SmolLM2, 20 went into that."""
    usual = {name: getattr(library, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in usual.items():
        setattr(library, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in usual.items():
            setattr(library, name, function)


def _write(path: Path, folder: Path) -> None:
    # Not AutoTokenizer, which would read the file's lists again for the config.
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
