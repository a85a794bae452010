"""How many replicas the items that wait and run ask for."""

from __future__ import annotations

from typing import Any

ITEMS, BACKLOG = "dure_items", "dure_backlog"
"""What replicas record: items that they hold, and items that their callers hold back for them."""


def by_items(context: Any) -> tuple[float, dict[str, Any]]:
    """Serve's autoscaling policy with items where Serve counts calls, as a call may carry any number of them.

    Every replica is told of the same backlog by its callers, so the largest counts once.
    """
    metrics = context.aggregated_metrics or {}
    backlog = max(metrics.get(BACKLOG, {}).values(), default=0.0)
    items = sum(metrics.get(ITEMS, {}).values()) + backlog
    if context.current_num_replicas == 0:
        return context.target_num_replicas, {}
    return items / context.config.get_target_ongoing_requests(), {}
