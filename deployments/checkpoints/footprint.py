"""Works out the GPU memory that a replica needs from its checkpoint's headers and config, without reading weights.

A footprint has four parts: the weights at the requested precision; the keys and values of all items that may run at
once, plus the prefix cache; the activations of the largest batch; and CUDA's own memory in the process.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deployments.checkpoints.layout import Layout
from deployments.checkpoints.modules import transformer_folders
from deployments.spec import CheckpointError, ModelSpec

CONTEXT_BYTES = 550 * 2**20
"""CUDA's context with torch's kernels and cuBLAS's workspace, as nvidia-smi shows it for an idle process: 450 to 600
MiB on GPUs from 2017 on."""
SLACK = 0.05
"""Added to weights and activations, as a fraction: torch's allocator rounds up and leaves gaps."""
HALF = 2
"""Bytes of a 16-bit value."""
INT8_ROW_BYTES = 4
"""bitsandbytes stores a float32 scale for each row: https://arxiv.org/abs/2208.07339."""
INT4_BYTES = 0.5 + 4 / 64
"""Half a byte per value, plus a float32 scale for each block of 64: https://arxiv.org/abs/2305.14314."""
SINGLE = 4
"""Bytes of a 32-bit value."""
PLAIN_BYTES = {"fp32": SINGLE, "fp16": HALF, "bf16": HALF, "auto": HALF}
"""Bytes of a weight that is not quantised, and of an activation. bitsandbytes computes quantised layers in 16 bit."""
CANDIDATES, GROWN_TOKENS = 50, 9
"""For next words at the largest `top_k` that the API accepts: candidates that grow in parallel, and tokens read per
candidate until it is complete (MAX_FIRST_TOKENS and MAX_WORD_TOKENS in engines/predictor.py)."""
HEAD_ROWS = 256
"""Candidates whose word probabilities are computed together (engines/predictor.py)."""
ROOM_TOKENS = 64
"""Tokens allocated to a sequence beyond those it has read."""
LAYER_WIDTHS, INNER_WIDTHS = 8, 2
"""Row widths that a layer holds at once, in multiples of the model's and its inner layer's width: the residual, the
normed input, queries, keys, values, the attention output and its projection, the sum; gate and up projection."""


@dataclass(frozen=True)
class Workload:
    """What one kind of model does with an item, as far as it affects memory."""

    prompt_tokens: int = 0
    """Tokens of text that it reads per item, at most or typically."""
    new_tokens: int = 0
    """Tokens that it generates per item. 0 for models without a key-value cache."""
    candidates: int = 0
    """Continuations that grow in parallel at the same positions. 0 for a model that generates a single one."""
    sees_images: bool = False
    quantises: bool = False
    """Whether int8 and int4 use bitsandbytes."""


NEXT_WORD = Workload(prompt_tokens=128, new_tokens=CANDIDATES * GROWN_TOKENS, candidates=CANDIDATES)
VISION = Workload(prompt_tokens=256, new_tokens=512, sees_images=True, quantises=True)
CHAT = Workload(prompt_tokens=512, new_tokens=512)
ENCODER = Workload()


@dataclass(frozen=True)
class Footprint:
    """The GPU memory that a replica needs, in bytes."""

    weights: int
    cache: int
    activations: int
    context: int = CONTEXT_BYTES

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations + self.context


def next_word(spec: ModelSpec, folder: Path) -> Footprint:
    """Footprint of a replica that predicts words. Raises CheckpointError if the config or headers cannot be read."""
    return _footprint(spec, folder, NEXT_WORD)


def vision(spec: ModelSpec, folder: Path) -> Footprint:
    """Footprint of a replica that answers questions about images. Raises CheckpointError as above."""
    return _footprint(spec, folder, VISION)


def encoder(spec: ModelSpec, folder: Path) -> Footprint:
    """Footprint of a replica that embeds texts or scores pairs. Raises CheckpointError as above."""
    return _footprint(spec, folder, ENCODER)


def chat(spec: ModelSpec, folder: Path) -> Footprint:
    """Footprint of a replica that answers conversations. Raises CheckpointError as above."""
    cache = int((spec.kv_cache_mb + spec.prefix_cache_mb) * 2**20)
    if not folder.is_file():
        return replace(_footprint(spec, folder, CHAT), cache=cache)
    from deployments.checkpoints import gguf  # here: it imports torch

    value, (sizes, values) = PLAIN_BYTES.get(spec.precision, HALF), gguf.sizes(folder)
    activations = _activations(spec, sizes, value, CHAT)
    return Footprint(round((1 + SLACK) * value * values), cache, round((1 + SLACK) * activations))


def footprint(spec: ModelSpec, folder: Path) -> Footprint:
    """Footprint of one replica, from the function that its spec names. Raises CheckpointError as above."""
    module, _, name = spec.footprint.partition(":")
    found: Footprint = getattr(importlib.import_module(module), name)(spec, folder)
    return found


def _footprint(spec: ModelSpec, folder: Path, work: Workload) -> Footprint:
    value = PLAIN_BYTES.get(spec.precision, HALF)
    layout = Layout.read(folder)
    parts = [_activity(spec, part, value, work) for part in transformer_folders(folder)]
    cache, activations = max(parts, default=(0, _rows(spec, layout)), key=sum)
    weights = _weights(spec, layout, value, work)
    return Footprint(round((1 + SLACK) * weights), cache, round((1 + SLACK) * activations))


def _activity(spec: ModelSpec, folder: Path, value: int, work: Workload) -> tuple[int, int]:
    """Bytes of keys and values, and of activations, of the transformer in `folder`."""
    from deployments.checkpoints.diagnosis import config_of  # here: not needed to serve a config that sets all shares

    config = config_of(folder)
    text = getattr(config, "text_config", config)
    try:
        activations = _activations(spec, text, value, work)
        if work.sees_images:
            activations += _tower(spec, config.vision_config, value)
        return _cache(spec, config, text, value, work), activations
    except AttributeError as error:
        raise CheckpointError(f"the config in {folder} is of an unknown kind: {error}") from error


def _rows(spec: ModelSpec, layout: Layout) -> int:
    """Bytes of the rows that the tokens of the largest batch take up, for a model that looks up words in a table."""
    return spec.max_batch_tokens * SINGLE * max((shape[-1] for shape in layout.shapes.values() if shape), default=0)


def _weights(spec: ModelSpec, layout: Layout, plain: int, work: Workload) -> int:
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
    """Whether bitsandbytes quantises this tensor: the matrix of any linear layer but the last."""
    return len(shape) == 2 and name.endswith(".weight") and "embed" not in name and "lm_head" not in name


def _quantised(shape: list[int], precision: str) -> float:
    values = math.prod(shape)
    return values + INT8_ROW_BYTES * shape[0] if precision == "int8" else INT4_BYTES * values


def _cache(spec: ModelSpec, config: Any, text: Any, value: int, work: Workload) -> int:
    """Keys and values of as many sequences as may run at once, at their longest, plus the prefix cache."""
    if not work.new_tokens:
        return 0
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    of_token = 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * width * value
    read, new = getattr(config, "image_seq_length", 0) + work.prompt_tokens, work.new_tokens
    if work.candidates:  # candidates share positions
        tokens = min(read, text.max_position_embeddings) + new
    else:
        tokens = min(read + new, text.max_position_embeddings)
    return int(spec.max_batch_items * (tokens + ROOM_TOKENS) * of_token + spec.prefix_cache_mb * 2**20)


def _activations(spec: ModelSpec, text: Any, value: int, work: Workload) -> int:
    """Activations of the largest batch or step, and its vocabulary scores.

    Scores are held as the model returns them, in float32, and as one derived float32 copy.
    """
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    layer = spec.max_batch_tokens * (LAYER_WIDTHS * text.hidden_size + INNER_WIDTHS * inner) * value
    items = spec.max_batch_items
    rows = items if work.new_tokens else 0
    if work.candidates:
        rows = max(2 * items, min(work.candidates * items, HEAD_ROWS))  # a first token takes twice as much
    return int(layer + rows * text.vocab_size * (value + 2 * SINGLE))


def _tower(spec: ModelSpec, vision: Any, value: int) -> int:
    """Activations of a vision tower for as many images as a batch may hold."""
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    widths = LAYER_WIDTHS * vision.hidden_size + INNER_WIDTHS * vision.intermediate_size
    pixels = 3 * vision.image_size**2 * (SINGLE + value)
    return int(spec.max_batch_items * (patches * widths * value + pixels))
