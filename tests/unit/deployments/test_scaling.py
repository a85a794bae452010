from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from deployments import scaling
from deployments.messages import Requests
from deployments.replica import ModelReplica
from deployments.scaling import BACKLOG, ITEMS, Backlogs, by_items


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


def test_a_replica_tells_what_all_its_callers_hold_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(scaling, "time", SimpleNamespace(monotonic=lambda: now))

    async def nothing(requests: Requests) -> AsyncIterator[Any]:
        for piece in ():
            yield piece

    async def told(calls: list[Requests]) -> float:
        for requests in calls:
            async for _ in replica.run(requests):
                pass
        return (await replica.record_autoscaling_stats())[BACKLOG]

    replica: Any = object.__new__(ModelReplica)
    replica.backlogs = Backlogs()
    replica.live = SimpleNamespace(run=nothing, batcher=SimpleNamespace(items=1))
    one, two = Requests([], [], [], backlog=60, caller="one"), Requests([], [], [], backlog=7, caller="two")
    assert asyncio.run(told([one, two])) == 67
    assert asyncio.run(told([Requests([], [], [], backlog=40, caller="one")])) == 47
    now += scaling.FRESH_S / 2
    assert asyncio.run(told([two])) == 47
    now += scaling.FRESH_S / 2
    assert asyncio.run(told([])) == 7
