"""An engine that takes 100 ms for any batch: what is left of the time is what a server adds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from deployments.progress import LoadProgress
from deployments.spec import Facts, ModelSpec

BATCH_S = 0.1


class Simulated:
    """Answers each item with itself."""

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
