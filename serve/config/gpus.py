"""GPUs as written in a config and for `dure plan --gpus`."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30
USABLE = 0.97
"""Fraction of a GPU's memory that models can use. The driver takes the rest. An A100 or H100 gives torch more: 79.1 of
80 GiB."""
ECC = 15 / 16
"""Fraction left by ECC if the memory stores its own check bits, as GDDR6 does. With ECC, an L4 or A10G gives torch 22.0
to 22.2 of 24 GiB, a T4 14.6 of 16, an L40 44.4 of 48. Without ECC there is more: an RTX 3090 gives 23.7 of 24."""
MOST_WITH_ECC = 48
"""Largest size, in GiB or GB, that ECC is assumed for. Larger GPUs have another kind of memory."""


@dataclass(frozen=True)
class Gpus:
    """A number of GPUs of one size."""

    count: int
    memory_bytes: float
    """Memory of each GPU that models can use."""

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """Parse COUNTxSIZE, such as 2x24GiB, for up to 9999 GPUs. Raises ValueError."""
        found = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,5}(?:\.[0-9]{1,5})?)\s*(GiB|GB)", text.strip(), re.IGNORECASE)
        if not found or not int(found[1]) or not float(found[2]):
            raise ValueError("GPUs are written as COUNTxSIZE, such as 2x24GiB or 1x80GB")
        unit = GIB if found[3].lower() == "gib" else 10**9
        usable = USABLE * (ECC if float(found[2]) <= MOST_WITH_ECC else 1)
        return cls(int(found[1]), usable * float(found[2]) * unit)
