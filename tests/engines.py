"""A user's engine as CONTRIBUTING shows it, which tests can make slow, failing or dead."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from deployments.load_progress import LoadProgress
from deployments.spec import CheckpointError, Facts, ItemError, ModelSpec


def pairs(context: Any) -> tuple[float, dict[str, Any]]:
    """A user's scaling policy: two replicas while there are requests, otherwise none."""
    return (2 if context.total_num_requests else 0), {}


class Shout:
    """Answers `{"say": text}` in capitals. While there is a file `hold_N`, its load waits at shard N of 4.

    In an item, `wait` makes the batch take that many seconds, `fail` makes it fail, and `die` makes every later batch
    fail. A batch whose items have more than 100 of `memory` in total runs out of memory.
    """

    facts = Facts("cpu", "fp32", False, 0)
    dead = cold = False

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Shout:
        if (folder / "broken").exists():
            raise CheckpointError(f"{folder / 'broken'} is in the way")
        if (folder / "deadly").exists():
            os._exit(3)
        for shard in range(1, 5):
            time.sleep(float((folder / "seconds_per_shard").read_text(encoding="utf-8")))
            held_until = time.monotonic() + 240
            while (folder / f"hold_{shard}").exists() and time.monotonic() < held_until:
                time.sleep(0.05)
            progress.checkpoint(25 * shard, shard, 4)
        made = cls()
        made.cold = (folder / "cold").exists()
        return made

    def warm_up(self) -> None:
        if self.cold:
            raise RuntimeError("it is too cold [/here]\nand more of it\n  on other lines")
        self.run([{"say": ""}])

    def prepare(self, request: Any) -> dict[str, Any]:
        if not isinstance(request, dict) or "say" not in request:
            raise ItemError("an item is an object with `say`")
        return request

    def cost(self, item: dict[str, Any]) -> int:
        return len(item["say"])

    def run(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.dead = self.dead or any(item.get("die") for item in items)
        if self.dead or any(item.get("fail") for item in items):
            raise RuntimeError("the engine tripped, as it was asked to")
        if sum(item.get("memory", 0) for item in items) > 100:
            raise MemoryError
        time.sleep(max(item.get("wait", 0) for item in items))
        return [{"said": item["say"].upper(), "batch": len(items)} for item in items]
