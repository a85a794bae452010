"""The longest text a model can take, read from its weights instead of its config."""

from __future__ import annotations

import math
import re

from torch import nn

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
