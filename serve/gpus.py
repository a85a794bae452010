"""GPUs as they are written in a config and after `dure plan --gpus`."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30
USABLE = 0.97
"""Of a GPU's memory: the rest goes to its driver."""


@dataclass(frozen=True)
class Gpus:
    """So many of one size."""

    count: int
    memory_bytes: float
    """Of each, that models can use."""

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """From COUNTxSIZE, such as 2x24GiB. Raises ValueError."""
        found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)\s*(GiB|GB)", text.strip(), re.IGNORECASE)
        if not found or not int(found[1]) or not float(found[2]):
            raise ValueError("GPUs are written as COUNTxSIZE, such as 2x24GiB or 1x80GB")
        unit = GIB if found[3].lower() == "gib" else 10**9
        return cls(int(found[1]), USABLE * float(found[2]) * unit)
