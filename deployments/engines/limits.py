"""How long a text may be for a model, from its weights rather than from what its files say."""

from __future__ import annotations

import math
import re

from torch import nn

POSITIONS = re.compile(r"(^|\.)(position_embeddings?|embed_positions|wpe)$")
"""Names of tables with a row for each place in a text; those of relative positions have others."""


def positions(model: nn.Module) -> float:
    """Places that the model's table of positions has rows for; infinite where it has none.

    RoBERTa's begin after the padding id, OPT's after an offset of 2.
    """
    limits = [
        table.num_embeddings
        - (0 if table.padding_idx is None else table.padding_idx + 1)
        - int(getattr(table, "offset", 0))
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and POSITIONS.search(name)
    ]
    return min(limits, default=math.inf)
