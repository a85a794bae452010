"""How much memory of a GPU a replica will take, worked out from its checkpoint's headers and config: no weights read.

Four parts: the weights at the precision asked for; keys and values of all items that may be on their way at once, with
the prefixes that are kept; what the largest batch computes in between; and what CUDA itself takes up in a process.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.checkpoints.layout import Layout
from deployments.spec import CheckpointError, ModelSpec

CONTEXT_BYTES = 550 * 2**20
"""CUDA's context with torch's kernels and cuBLAS's workspace, as nvidia-smi shows it for an idle process: 450 to 600
MiB on GPUs from 2017 on."""
SLACK = 0.05
"""Of weights and activations: torch's allocator rounds up and keeps gaps."""
HALF = 2
INT8_ROW_BYTES = 4
"""bitsandbytes keeps a float32 scale for each row: https://arxiv.org/abs/2208.07339."""
INT4_BYTES = 0.5 + 4 / 64
"""Half a byte, and a float32 scale for each block of 64: https://arxiv.org/abs/2305.14314."""
SINGLE = 4
PLAIN_BYTES = {"fp32": SINGLE, "fp16": HALF, "bf16": HALF, "auto": HALF}
"""Of a weight that is not quantised, and of all that is computed; what bitsandbytes quantises is computed in 16 bit."""
CANDIDATES, GROWN_TOKENS = 50, 9
"""Of next words at the largest `top_k` that the API takes: what may grow side by side, and the tokens of each that are
read until it has its last one (MAX_FIRST_TOKENS and MAX_WORD_TOKENS in engines/predictor.py)."""
HEAD_ROWS = 256
"""Of candidates, whose words' probabilities are worked out at once (engines/predictor.py)."""
ROOM_TOKENS = 64
"""That a sequence is given beyond what it has read."""
LAYER_WIDTHS, INNER_WIDTHS = 8, 2
"""Rows of a layer that live at once, in widths of the model and of its inner layer: the residual, the normed input,
queries, keys, values, attention's result and its projection, the sum; gate and up projection."""


@dataclass(frozen=True)
class Work:
    """What one kind of model does with an item, as far as it takes memory."""

    prompt_tokens: int = 0
    """Tokens of text that it reads, at most or as a rule."""
    new_tokens: int = 0
    """Tokens that it writes; 0 for models that keep no keys and values."""
    candidates: int = 0
    """Continuations that grow side by side on the same positions; 0 for a model that writes a single one."""
    sees_images: bool = False
    quantises: bool = False
    """Do int8 and int4 go through bitsandbytes?"""


NEXT_WORD = Work(prompt_tokens=128, new_tokens=CANDIDATES * GROWN_TOKENS, candidates=CANDIDATES)
VISION = Work(prompt_tokens=256, new_tokens=512, sees_images=True, quantises=True)
ENCODER = Work()


@dataclass(frozen=True)
class Footprint:
    """In bytes."""

    weights: int
    cache: int
    activations: int
    context: int = CONTEXT_BYTES

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations + self.context


def next_word(spec: ModelSpec, folder: Path) -> Footprint:
    """Of a replica that predicts words. Raises CheckpointError where config or headers can't be read."""
    return _footprint(spec, folder, NEXT_WORD)


def vision(spec: ModelSpec, folder: Path) -> Footprint:
    """Of a replica that answers questions about images. Raises CheckpointError as above."""
    return _footprint(spec, folder, VISION)


def encoder(spec: ModelSpec, folder: Path) -> Footprint:
    """Of a replica that embeds texts or scores pairs. Raises CheckpointError as above."""
    return _footprint(spec, folder, ENCODER)


def footprint(spec: ModelSpec, folder: Path) -> Footprint:
    """What one replica takes, by the function that its spec names. Raises CheckpointError as above."""
    module, _, name = spec.footprint.partition(":")
    found: Footprint = getattr(importlib.import_module(module), name)(spec, folder)
    return found


def _footprint(spec: ModelSpec, folder: Path, work: Work) -> Footprint:
    from transformers import AutoConfig  # here, because a config that says all shares is served without it

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the config in {folder} can't be read: {error}") from error
    text = getattr(config, "text_config", config)
    value = PLAIN_BYTES.get(spec.precision, HALF)
    weights = _weights(spec, folder, value, work)
    try:
        activations = _activations(spec, text, value, work)
        if work.sees_images:
            activations += _tower(spec, config.vision_config, value)
        cache = _cache(spec, config, text, value, work)
    except AttributeError as error:
        raise CheckpointError(f"the config in {folder} is of no kind that is known here: {error}") from error
    return Footprint(round((1 + SLACK) * weights), cache, round((1 + SLACK) * activations))


def _weights(spec: ModelSpec, folder: Path, plain: int, work: Work) -> int:
    layout = Layout.read(folder)
    if not work.quantises or spec.precision not in ("int8", "int4"):
        return plain * layout.values
    if not layout.shapes:
        return round(layout.values * (1 if spec.precision == "int8" else INT4_BYTES))
    return round(
        sum(
            _quantised(shape, spec.precision) if _is_linear(name, shape) else plain * math.prod(shape)
            for name, shape in layout.shapes.items()
        )
    )


def _is_linear(name: str, shape: list[int]) -> bool:
    """Is this a matrix that bitsandbytes replaces: that of a linear layer, other than the last?"""
    return len(shape) == 2 and name.endswith(".weight") and "embed" not in name and "lm_head" not in name


def _quantised(shape: list[int], precision: str) -> float:
    values = math.prod(shape)
    return values + INT8_ROW_BYTES * shape[0] if precision == "int8" else INT4_BYTES * values


def _cache(spec: ModelSpec, config: Any, text: Any, value: int, work: Work) -> int:
    """Keys and values of as many sequences as may be on their way, at their longest."""
    if not work.new_tokens:
        return 0
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    of_token = 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * width * value
    read, new = getattr(config, "image_seq_length", 0) + work.prompt_tokens, work.new_tokens
    if work.candidates:  # they share positions
        tokens = min(read, text.max_position_embeddings) + new
    else:
        tokens = min(read + new, text.max_position_embeddings)
    return int(spec.max_batch_items * (tokens + ROOM_TOKENS) * of_token + spec.prefix_cache_mb * 2**20)


def _activations(spec: ModelSpec, text: Any, value: int, work: Work) -> int:
    """Of the largest batch, or step, and of its words' scores: as the model has them, in float32 and what is made of
    them.
    """
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    layer = spec.max_batch_tokens * (LAYER_WIDTHS * text.hidden_size + INNER_WIDTHS * inner) * value
    items = spec.max_batch_items
    rows = items if work.new_tokens else 0
    if work.candidates:
        rows = max(2 * items, min(work.candidates * items, HEAD_ROWS))  # a first token takes twice as much
    return int(layer + rows * text.vocab_size * (value + 2 * SINGLE))


def _tower(spec: ModelSpec, vision: Any, value: int) -> int:
    """Of a vision tower with as many images as a batch may hold."""
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    widths = LAYER_WIDTHS * vision.hidden_size + INNER_WIDTHS * vision.intermediate_size
    pixels = 3 * vision.image_size**2 * (SINGLE + value)
    return int(spec.max_batch_items * (patches * widths * value + pixels))
