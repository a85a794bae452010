"""Engines that only sleep: the rest of the time is what a server adds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from deployments.load_progress import LoadProgress
from deployments.spec import Facts, ModelSpec

BATCH_S = 0.1
TIGHT_S = 0.01
TIGHT_TOKENS = 2000


class Simulated:
    """Takes 100 ms for any batch and answers each item with itself."""

    facts = Facts("cpu", "fp32", False, 0)

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Simulated:
        return cls()

    def warm_up(self) -> None: ...

    def prepare(self, request: Any) -> Any:
        return request

    def cost(self, item: Any) -> int:
        return 16

    def run(self, items: list[Any]) -> list[Any]:
        time.sleep(BATCH_S)
        return items


class Tight(Simulated):
    """Runs out of memory above TIGHT_TOKENS padded tokens; each word of an item is a token."""

    def cost(self, item: str) -> int:
        return len(item.split())

    def run(self, items: list[str]) -> list[str]:
        if len(items) * max(map(self.cost, items)) > TIGHT_TOKENS:
            raise MemoryError
        time.sleep(TIGHT_S)
        return items
