"""GPUs as they are written in a config and after `dure plan --gpus`."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30
USABLE = 0.97
"""Of a GPU's memory: the rest goes to its driver. Of 80 GiB an A100 or H100 gives torch 79.1, which is more."""
ECC = 15 / 16
"""Of memory that holds its own check bits, as GDDR6 does where ECC is on: of 24 GiB an L4 or A10G gives torch 22.0 to
22.2, of 16 a T4 14.6, of 48 an L40 44.4. Without ECC a card has more: an RTX 3090 gives 23.7 of 24."""
MOST_WITH_ECC = 48
"""Larger ones have memory of another kind, in GiB or GB."""


@dataclass(frozen=True)
class Gpus:
    """So many of one size."""

    count: int
    memory_bytes: float
    """Of each, that models can use."""

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """From COUNTxSIZE, such as 2x24GiB, of up to 9999 GPUs. Raises ValueError."""
        found = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,5}(?:\.[0-9]{1,5})?)\s*(GiB|GB)", text.strip(), re.IGNORECASE)
        if not found or not int(found[1]) or not float(found[2]):
            raise ValueError("GPUs are written as COUNTxSIZE, such as 2x24GiB or 1x80GB")
        unit = GIB if found[3].lower() == "gib" else 10**9
        usable = USABLE * (ECC if float(found[2]) <= MOST_WITH_ECC else 1)
        return cls(int(found[1]), usable * float(found[2]) * unit)
