"""How many replicas the items that wait and run ask for."""

from __future__ import annotations

import time
from typing import Any

ITEMS, BACKLOG = "dure_items", "dure_backlog"
"""What replicas record: items that they hold, and items that their callers hold back for them."""
FRESH_S = 5.0
"""A caller with a backlog calls all the time; older news of one is no news."""


class Backlogs:
    """What each of a replica's callers holds back, as of its last call."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[int, float]] = {}
        """By caller: items, and when it said so (time.monotonic)."""

    def tell(self, caller: str, items: int) -> None:
        self._of[caller] = items, time.monotonic()

    def total(self) -> int:
        """Items that all hold back who have called lately."""
        since = time.monotonic() - FRESH_S
        self._of = {caller: (items, at) for caller, (items, at) in self._of.items() if at > since}
        return sum(items for items, _ in self._of.values())


def by_items(context: Any) -> tuple[float, dict[str, Any]]:
    """Serve's autoscaling policy with items where Serve counts calls, as a call may carry any number of them.

    Every replica is told of the same backlogs by the same callers, so the largest sum counts once.
    """
    metrics = context.aggregated_metrics or {}
    backlog = max(metrics.get(BACKLOG, {}).values(), default=0.0)
    items = sum(metrics.get(ITEMS, {}).values()) + backlog
    if context.current_num_replicas == 0:
        return context.target_num_replicas, {}
    return items / context.config.get_target_ongoing_requests(), {}
