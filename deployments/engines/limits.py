"""The longest text and the largest token id that a model can take, read from its weights instead of its config."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

UNBOUNDED = 2**31 - 1

POSITIONS = re.compile(r"(^|\.)(position_embeddings?|embed_positions|wpe)$")
"""Names of tables with a row per position. Tables of relative positions have other names."""


def positions(model: nn.Module) -> float:
    """Positions for which the model's table has rows; infinite if it has no such table.

    RoBERTa's positions begin after the padding id, OPT's after an offset of 2.
    """
    limits = [
        table.num_embeddings
        - (0 if table.padding_idx is None else table.padding_idx + 1)
        - int(getattr(table, "offset", 0))
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and POSITIONS.search(name)
    ]
    return min(limits, default=math.inf)


def table_rows(model: Any) -> int:
    """Rows of the model's table of token embeddings; UNBOUNDED if it has none, as CANINE, which hashes characters.

    A model of several towers has the table in its text tower.
    """
    for part in (model, getattr(model, "text_model", model)):
        try:
            table = part.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        weight = getattr(table, "weight", None)  # a table need not be an nn.Embedding: I-BERT's is quantised
        if isinstance(weight, torch.Tensor):
            return int(weight.shape[0])
    return UNBOUNDED
