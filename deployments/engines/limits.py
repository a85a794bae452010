"""The longest text and the largest token id that a model can take, read from its weights instead of its config."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

UNBOUNDED = 2**31 - 1

POSITIONS = re.compile(r"(^|\.)(position_embeddings?|embed_positions|wpe)$")
"""Names of tables with a row per position. Tables of relative positions have other names."""


def positions(model: nn.Module) -> float:
    """Positions for which the model's table has rows; infinite if it has no such table.

    RoBERTa's positions begin after the padding id, OPT's after an offset of 2.
    """
    limits = [_height(table) - _first(table) - int(getattr(table, "offset", 0)) for table in _tables(model)]
    return min(limits, default=math.inf)


def first_position(model: nn.Module) -> int:
    """The position id of a text's first token. RoBERTa's begin after the padding id; OPT's table adds its offset."""
    return max(map(_first, _tables(model)), default=0)


def max_tokens(model: PreTrainedModel) -> int:
    """Most tokens of a sequence that the model reads together with others.

    Phi-3's long variants scale the positions of a whole pass anew as soon as one of them is beyond the original
    length, so that sequences would change each other.
    """
    config = model.config.get_text_config(decoder=True)
    stated = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [each for each in (rope, *rope.values()) if isinstance(each, dict) and each.get("rope_type") == "longrope"]
    original = [each.get("original_max_position_embeddings") or stated for each in ropes]
    return int(min(positions(model), stated, *original, UNBOUNDED))


def _tables(model: nn.Module) -> list[Any]:
    """Tables with a row per position. They need not be nn.Embedding: I-BERT's are quantised."""
    named = model.named_modules()
    return [table for name, table in named if hasattr(table, "padding_idx") and POSITIONS.search(name)]


def _height(table: Any) -> int:
    return int(table.weight.shape[0])


def _first(table: Any) -> int:
    return 0 if table.padding_idx is None else table.padding_idx + 1


def text_part(model: Any) -> Any:
    """The text tower of a model of several, or the model itself."""
    return getattr(model, "text_model", model)


def table_rows(model: Any) -> int:
    """Rows of the model's table of token embeddings; UNBOUNDED if it has none, as CANINE, which hashes characters.

    A model of several towers has the table in its text tower.
    """
    for part in (model, text_part(model)):
        try:
            table = part.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(getattr(table, "weight", None), torch.Tensor):
            return _height(table)
    return UNBOUNDED
