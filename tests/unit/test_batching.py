from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ray.serve import context
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.schema import ReplicaRank

from deployments import batching
from deployments.batching import FAILURES_BEFORE_TEST, Batcher, EngineDead
from deployments.spec import ItemError, ModelSpec, Refusal


@pytest.fixture(autouse=True)
def in_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """`@serve.batch` asks the replica that it runs in for its limits."""
    monkeypatch.setattr(context, "_INTERNAL_REPLICA_CONTEXT", None)
    context._set_internal_replica_context(
        replica_id=ReplicaID("r", DeploymentID("m", "dure")),
        servable_object=lambda: None,
        _deployment_config=DeploymentConfig(max_ongoing_requests=100),
        rank=ReplicaRank(rank=0, node_rank=0, local_rank=0),
        world_size=1,
    )


class Counting:
    """Remembers its batches; negative items fail, `None` is refused."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.hold = threading.Event()
        self.hold.set()
        self.broken = False

    def warm_up(self) -> None:
        self.run([1])

    def cost(self, item: Any) -> int:
        return 1

    def run(self, items: list[Any]) -> list[Any]:
        self.hold.wait(10)
        self.batches.append(items)
        if self.broken:
            raise RuntimeError("broken for good")
        if None in items:
            raise ItemError("None is no item")
        if any(item < 0 for item in items):
            raise RuntimeError("a negative item")
        return [item * 10 for item in items]


def run(scenario: Callable[[Batcher, Counting], Coroutine[Any, Any, None]], max_items: int = 4) -> Counting:
    engine = Counting()

    async def main() -> None:
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(engine, ModelSpec("m", "t", "s", max_batch_items=max_items), thread)
            await scenario(batcher, engine)
            batcher._pumping.cancel()

    asyncio.run(main())
    return engine


def test_what_waits_while_the_engine_runs_leaves_as_one_batch() -> None:
    async def scenario(batcher: Batcher, engine: Counting) -> None:
        engine.hold.clear()
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.sleep(0.05)
        rest = [asyncio.create_task(batcher.submit(item)) for item in range(1, 8)]
        await asyncio.sleep(0.05)
        engine.hold.set()
        assert await asyncio.gather(first, *rest) == [item * 10 for item in range(8)]

    assert [len(batch) for batch in run(scenario).batches] == [1, 4, 3]


def test_an_item_whose_caller_has_gone_is_not_run() -> None:
    async def scenario(batcher: Batcher, engine: Counting) -> None:
        engine.hold.clear()
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.sleep(0.05)
        gone, stays = asyncio.create_task(batcher.submit(1)), asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.sleep(0)
        engine.hold.set()
        assert await asyncio.gather(first, stays) == [0, 20]
        assert batcher.waiting == 0

    assert run(scenario).batches == [[0], [2]]


def test_a_bad_item_fails_alone() -> None:
    async def scenario(batcher: Batcher, engine: Counting) -> None:
        good, bad, refused, other = await asyncio.gather(*(batcher.submit(item) for item in (1, -1, None, 3)))
        assert (good, other) == (10, 30)
        assert bad == Refusal(batching._FAILED, "failed")
        assert refused == Refusal("None is no item")
        batcher.check()

    run(scenario)


def test_an_engine_that_fails_even_its_warm_up_is_dead() -> None:
    async def scenario(batcher: Batcher, engine: Counting) -> None:
        engine.broken = True
        for _ in range(FAILURES_BEFORE_TEST):
            batcher.check()
            await batcher.submit(1)
        with pytest.raises(EngineDead, match="broken for good"):
            batcher.check()

    run(scenario)


def test_bad_items_alone_do_not_make_an_engine_dead() -> None:
    async def scenario(batcher: Batcher, engine: Counting) -> None:
        for _ in range(3 * FAILURES_BEFORE_TEST):
            await batcher.submit(-1)
            batcher.check()

    run(scenario)


def test_an_engine_that_hangs_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MAX_STALL_S", 0.05)

    async def scenario(batcher: Batcher, engine: Counting) -> None:
        engine.hold.clear()
        hanging = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.2)
        with pytest.raises(EngineDead, match="not come back"):
            batcher.check()
        engine.hold.set()
        await hanging

    started = time.monotonic()
    run(scenario)
    assert time.monotonic() - started < 5
