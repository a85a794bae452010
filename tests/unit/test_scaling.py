from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from deployments.scaling import BACKLOG, ITEMS, by_items


def wanted(replicas: int, metrics: dict[str, Any] | None) -> float:
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 16)
    context = SimpleNamespace(
        aggregated_metrics=metrics, current_num_replicas=replicas, target_num_replicas=1, config=config
    )
    return by_items(context)[0]


def test_replicas_follow_items_with_the_backlog_counted_once() -> None:
    metrics = {ITEMS: {"r1": 20, "r2": 12}, BACKLOG: {"r1": 60, "r2": 64}}
    assert wanted(2, metrics) == (20 + 12 + 64) / 16


def test_nothing_waiting_asks_for_no_replica_and_a_start_from_none_for_one() -> None:
    assert wanted(2, {}) == 0
    assert wanted(2, None) == 0
    assert wanted(0, None) == 1
