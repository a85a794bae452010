from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from ray.serve import context
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.schema import ReplicaRank

from deployments.batching import runner as running
from deployments.batching.batcher import Batcher
from deployments.batching.making import batcher_of
from deployments.batching.runner import FAILED, FAILURES_BEFORE_TEST, NO_ROOM, TOO_LARGE, EngineDead
from deployments.batching.waiting import LATE
from deployments.collector import Collector
from deployments.engines.contract import Stepping
from deployments.messages import Answers, Refusal
from deployments.spec import Facts, ItemError, ModelSpec


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


@dataclass
class Tens:
    values: np.ndarray


class Counting:
    """Answers ten times an item, which is as long as it is large, and remembers its batches.

    Negative items fail, `None` is refused, for 13 there is no answer at all, and above `room` padded tokens there is no
    memory.
    """

    facts = Facts("cpu", "fp32", False, 0)

    def __init__(self, arrays: bool = False, room: int = 10**9) -> None:
        self.batches: list[list[Any]] = []
        self.go = threading.Event()
        self.go.set()
        self.broken = False
        self.arrays = arrays
        self.room = room

    def warm_up(self) -> None:
        self.run([1])

    def cost(self, item: Any) -> int:
        return abs(item) if item else 1

    def run(self, items: list[Any]) -> Any:
        self.go.wait(10)
        self.batches.append(items)
        if self.broken:
            raise RuntimeError("broken for good")
        if None in items:
            raise ItemError("None is no item")
        if any(item < 0 for item in items):
            raise RuntimeError("a negative item")
        if max(map(self.cost, items)) * len(items) > self.room:
            raise MemoryError
        tens = [item * 10 for item in items if item != 13]
        return Tens(np.array(tens)) if self.arrays else tens


@dataclass
class Countdown:
    """Takes as many steps as its item is large."""

    item: int
    left: int
    result: int | None = None

    @property
    def cost(self) -> int:
        return 1


class Counter(Counting, Stepping[int, int, Countdown]):
    """The same in steps."""

    def begin(self, item: int) -> Countdown:
        return Countdown(item, abs(item))

    def step(self, works: list[Countdown]) -> None:
        Counting.run(self, [work.item for work in works])
        for work in works:
            work.left -= 1
            if not work.left:
                work.result = work.item * 10


class Bench:
    """A batcher over a counting engine, whose batches can be held up."""

    def __init__(self, batcher: Batcher, engine: Counting) -> None:
        self.batcher, self.engine = batcher, engine
        self.items: list[Any] = []
        """All submitted so far; an item's index is its number."""

    def submit(self, *items: Any, timeout_s: float = 10) -> asyncio.Task[Answers]:
        return asyncio.create_task(self._answers(list(items), timeout_s))

    async def _answers(self, items: list[Any], timeout_s: float) -> Answers:
        collector = Collector(len(items))
        numbers = range(len(self.items), len(self.items) + len(items))
        self.items += items
        async with contextlib.aclosing(self.batcher.submit(items, [timeout_s] * len(items), [*numbers])) as pieces:
            async for piece in pieces:
                collector.put(
                    [numbers.index(number) for number in piece.numbers], piece.results, range(len(piece.numbers))
                )
                for number, refusal in piece.refusals.items():
                    collector.refuse(numbers.index(number), refusal)
        return collector.answers()

    async def hold(self) -> asyncio.Task[Answers]:
        """One item of length 1 that keeps the engine busy until `go`."""
        self.engine.go.clear()
        first = self.submit(1)
        await asyncio.sleep(0.05)
        return first

    async def go(self) -> None:
        await asyncio.sleep(0.05)
        self.engine.go.set()


def run(
    scenario: Callable[[Bench], Coroutine[Any, Any, None]],
    max_items: int = 4,
    max_tokens: int = 1000,
    kind: type[Counting] = Counting,
    **engine: Any,
) -> list[list[Any]]:
    """The batches that were made."""
    counting = kind(**engine)

    async def main() -> None:
        with ThreadPoolExecutor(getattr(counting, "parallel", 1)) as threads:
            spec = ModelSpec("m", "t", "s", max_batch_items=max_items, max_batch_tokens=max_tokens)
            batcher = batcher_of(counting, spec, threads)
            await scenario(Bench(batcher, counting))
            assert batcher.items == 0
            batcher.close()

    asyncio.run(main())
    return counting.batches


@pytest.mark.parametrize("arrays", [False, True])
def test_what_waits_while_the_engine_runs_leaves_as_one_batch(arrays: bool) -> None:
    async def scenario(bench: Bench) -> None:
        first = await bench.hold()
        calls = [bench.submit(5, 6, 7), bench.submit(8), bench.submit(9, 10, 11)]
        await bench.go()
        for call, expected in zip([first, *calls], [[10], [50, 60, 70], [80], [90, 100, 110]], strict=True):
            results = (await call).results
            assert list(results.values if arrays else results) == expected

    assert run(scenario, arrays=arrays) == [[1], [5, 6, 7, 8], [9, 10, 11]]


class Parallel(Counting):
    """Runs two batches at once: a batch with an item of length 7 goes on when another runs beside it."""

    parallel = 2

    def __init__(self) -> None:
        super().__init__()
        self.both = threading.Barrier(2, timeout=10)

    def run(self, items: list[Any]) -> Any:
        if 7 in items:
            self.both.wait()
        return super().run(items)


def test_two_batches_run_at_once_on_an_engine_that_can() -> None:
    async def scenario(bench: Bench) -> None:
        for _ in range(5):
            answers = await asyncio.gather(bench.submit(7, 7), bench.submit(7, 7))
            assert all(each.results == [70, 70] for each in answers)

    run(scenario, max_items=2, kind=Parallel)


@pytest.mark.parametrize(("items", "expected"), [([3] * 4, [[3] * 4]), ([7] * 32, [[7] * 16, [7] * 16])])
def test_a_list_alone_is_divided_among_free_threads_and_little_is_not(
    items: list[int], expected: list[list[int]]
) -> None:
    async def scenario(bench: Bench) -> None:
        for _ in range(40):
            bench.batcher.cost.observe(1, 0.003)
            bench.batcher.cost.observe(1000, 0.503)  # so starting a batch costs as much as 5 tokens
        bench.batcher.budget.observe(1024, 0.503, full=False)
        assert (await bench.submit(*items)).results == [item * 10 for item in items]

    assert run(scenario, max_items=64, max_tokens=10_000, kind=Parallel) == expected


def test_what_runs_on_one_thread_does_not_hold_up_what_comes_for_another() -> None:
    async def scenario(bench: Bench) -> None:
        slow = bench.submit(7)
        assert (await bench.submit(2)).results == [20]
        assert not slow.done()
        assert (await asyncio.gather(slow, bench.submit(7)))[0].results == [70]

    run(scenario, max_items=1, kind=Parallel)


def test_a_bad_item_on_one_thread_harms_nothing_on_another() -> None:
    async def scenario(bench: Bench) -> None:
        answers = await asyncio.gather(*(bench.submit(item, -item, 13) for item in range(1, 7)))
        for item, each in enumerate(answers, 1):
            assert each.results[0] == 10 * item
            assert set(each.refusals) == {1, 2}
        bench.batcher.check()

    run(scenario, max_items=8, kind=Parallel)


def test_a_batch_keeps_within_its_padded_tokens_and_a_long_item_runs_alone() -> None:
    async def scenario(bench: Bench) -> None:
        first = await bench.hold()
        rest = bench.submit(10, 10, 10, 50, 10)
        await bench.go()
        assert (await rest).results == [100, 100, 100, 500, 100]
        await first

    batches = run(scenario, max_items=100, max_tokens=40)
    assert all(len(batch) == 1 or max(batch) * len(batch) <= 40 for batch in batches)
    assert [50] in batches


def test_an_item_whose_caller_has_gone_is_not_run() -> None:
    async def scenario(bench: Bench) -> None:
        first = await bench.hold()
        gone, stays = bench.submit(2), bench.submit(3)
        await asyncio.sleep(0.05)
        gone.cancel()
        await bench.go()
        assert (await stays).results == [30]
        await first

    assert run(scenario) == [[1], [3]]


def test_an_item_whose_deadline_has_passed_is_not_run() -> None:
    async def scenario(bench: Bench) -> None:
        first = await bench.hold()
        late, stays = bench.submit(2, timeout_s=0.01), bench.submit(3)
        await bench.go()
        assert (await late).refusals == {0: LATE}
        assert (await stays).results == [30]
        await first

    assert run(scenario) == [[1], [3]]


def test_a_bad_item_fails_alone() -> None:
    async def scenario(bench: Bench) -> None:
        answers = await bench.submit(1, -1, None, Refusal("refused before"), 3)
        assert answers.results[0] == 10
        assert answers.results[4] == 30
        assert answers.refusals == {
            1: Refusal(FAILED, "failed"),
            2: Refusal("None is no item"),
            3: Refusal("refused before"),
        }
        bench.batcher.check()

    run(scenario)


@pytest.mark.parametrize("arrays", [False, True])
def test_an_engine_that_leaves_out_a_result_harms_no_neighbour(arrays: bool) -> None:
    async def scenario(bench: Bench) -> None:
        first, second = await asyncio.gather(bench.submit(1, 13), bench.submit(2, 3))
        assert first.refusals == {1: Refusal(FAILED, "failed")}
        assert not second.refusals
        assert list(second.results.values if arrays else second.results) == [20, 30]

    run(scenario, arrays=arrays)


def test_memory_that_runs_out_is_seen_by_no_caller() -> None:
    async def scenario(bench: Bench) -> None:
        for _ in range(20):
            answers = await asyncio.gather(*(bench.submit(10, 10, 10) for _ in range(10)))
            assert all(each.results == [100, 100, 100] and not each.refusals for each in answers)

    batches = run(scenario, max_items=100, room=100)
    failed = [len(batch) for batch in batches if len(batch) * 10 > 100]
    assert failed
    assert len(failed) < 10, "the budget has learnt what fits"


def test_an_item_that_does_not_fit_alone_is_refused_alone() -> None:
    async def scenario(bench: Bench) -> None:
        answers = await bench.submit(10, 200, 20)
        assert answers.refusals == {1: Refusal(TOO_LARGE, "too_large")}
        assert (answers.results[0], answers.results[2]) == (100, 200)

    run(scenario, room=100)


def test_an_engine_that_fails_even_its_warm_up_is_dead() -> None:
    async def scenario(bench: Bench) -> None:
        bench.engine.broken = True
        for _ in range(FAILURES_BEFORE_TEST):
            bench.batcher.check()
            await bench.submit(1)
        with pytest.raises(EngineDead, match="broken for good"):
            bench.batcher.check()

    run(scenario)


def test_bad_items_alone_do_not_make_an_engine_dead() -> None:
    async def scenario(bench: Bench) -> None:
        for _ in range(3 * FAILURES_BEFORE_TEST):
            await bench.submit(-1)
            bench.batcher.check()

    run(scenario)


def test_an_engine_that_hangs_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "MAX_STALL_S", 0.05)

    async def scenario(bench: Bench) -> None:
        hanging = await bench.hold()
        await asyncio.sleep(0.15)
        with pytest.raises(EngineDead, match="not returned from a batch"):
            bench.batcher.check()
        await bench.go()
        await hanging

    started = time.monotonic()
    run(scenario)
    assert time.monotonic() - started < 5


def test_items_join_at_the_next_step_and_leave_when_they_are_done() -> None:
    async def scenario(bench: Bench) -> None:
        bench.engine.go.clear()
        first = bench.submit(3)
        await asyncio.sleep(0.05)
        more = bench.submit(2, 1)
        await bench.go()
        assert (await first).results == [30]
        assert (await more).results == [20, 10]

    assert run(scenario, kind=Counter) == [[3], [3, 2, 1], [3, 2]]


def test_an_item_whose_client_left_takes_no_further_step() -> None:
    async def scenario(bench: Bench) -> None:
        bench.engine.go.clear()
        left, stays = bench.submit(5), bench.submit(3)
        await asyncio.sleep(0.05)
        left.cancel()
        await bench.go()
        assert (await stays).results == [30]

    assert run(scenario, kind=Counter) == [[5, 3], [3], [3]]


def test_an_item_that_is_taken_back_takes_no_further_step() -> None:
    async def scenario(bench: Bench) -> None:
        bench.engine.go.clear()
        call = bench.submit(5, 3)
        await asyncio.sleep(0.05)
        waits = bench.submit(4, 2)
        await asyncio.sleep(0.05)
        bench.batcher.take_back([bench.items.index(5), bench.items.index(4), 77])
        await bench.go()
        assert (await call).results == [None, 30]
        assert (await waits).results == [None, 20]

    assert run(scenario, kind=Counter) == [[5, 3], [3, 2], [3, 2]]


def test_no_more_items_are_on_their_way_than_a_batch_may_hold() -> None:
    async def scenario(bench: Bench) -> None:
        answers = await bench.submit(*[2] * 5, *[3] * 5)
        assert answers.results == [20] * 5 + [30] * 5

    assert max(map(len, run(scenario, kind=Counter, max_items=4))) == 4


def test_an_item_that_fails_a_step_harms_no_other() -> None:
    async def scenario(bench: Bench) -> None:
        answers = await bench.submit(2, -3, 4)
        assert answers.refusals == {1: Refusal(FAILED, "failed")}
        assert answers.results == [20, None, 40]

    run(scenario, kind=Counter)


def test_items_that_do_not_fit_beside_others_wait_for_their_memory() -> None:
    """A step of this engine takes as many tokens as its items are large; three of five do not fit into ten."""

    async def scenario(bench: Bench) -> None:
        answers = await bench.submit(5, 5, 5)
        assert answers.results == [50, 50, 50]
        alone = await bench.submit(11)
        assert alone.refusals == {0: Refusal(TOO_LARGE, "too_large")}
        assert (await bench.submit(2)).results == [20]

    run(scenario, kind=Counter, room=10)


def test_where_none_fits_any_more_the_last_makes_room() -> None:
    class Growing(Counter):
        """An item keeps hold of one more at each step, until nobody has it any more."""

        def __init__(self, room: int) -> None:
            super().__init__(room=room)
            self.begun: list[weakref.ref[Countdown]] = []

        def begin(self, item: int) -> Countdown:
            work = super().begin(item)
            self.begun.append(weakref.ref(work))
            return work

        def step(self, works: list[Countdown]) -> None:
            alive = [work for known in self.begun if (work := known())]
            if sum(work.item - work.left + 1 for work in alive) > self.room:
                raise MemoryError
            super().step(works)

    async def scenario(bench: Bench) -> None:
        answers = await bench.submit(4, 4)
        assert answers.refusals == {1: Refusal(NO_ROOM, "too_large")}
        assert answers.results == [40, None]

    run(scenario, kind=Growing, room=5)
