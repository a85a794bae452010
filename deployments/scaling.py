"""Autoscaling by the number of waiting and running items."""

from __future__ import annotations

import time
from typing import Any

ITEMS, BACKLOG = "dure_items", "dure_backlog"
"""Metrics that replicas record: items they hold, and items their callers hold back."""
FRESH_S = 5.0
"""Callers with a backlog call continuously; older reports are stale."""


class Backlogs:
    """Items that each of a replica's callers holds back, as of its last call."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[int, float]] = {}
        """By caller: items, and when it reported them (time.monotonic)."""

    def update(self, caller: str, items: int) -> None:
        self._of[caller] = items, time.monotonic()

    def total(self) -> int:
        """Items held back by all callers that called recently."""
        since = time.monotonic() - FRESH_S
        self._of = {caller: (items, at) for caller, (items, at) in self._of.items() if at > since}
        return sum(items for items, _ in self._of.values())


def by_items(context: Any) -> tuple[float, dict[str, Any]]:
    """Serve's autoscaling policy, counting items instead of calls, as a call carries any number of items.

    All replicas hear of the same backlogs from the same callers, so only the largest sum counts.
    """
    metrics = context.aggregated_metrics or {}
    backlog = max(metrics.get(BACKLOG, {}).values(), default=0.0)
    items = sum(metrics.get(ITEMS, {}).values()) + backlog
    if context.current_num_replicas == 0:
        return context.target_num_replicas, {}
    return items / context.config.get_target_ongoing_requests(), {}
