from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from deployments.messages import Answers, Pair, Piece, Prompt, Refusal, Requests, Text, turns
from serve.calls.coalescer import Coalescer
from serve.progress import Following, Progress


class Replica:
    """Stands in for a replica: answers each number with ten times itself and refuses negative ones.

    It runs one call at a time, while `go` is set.
    """

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.backlogs: list[int] = []
        self.callers: set[str] = set()
        self.numbers: dict[int, int] = {}
        self.taken_back: list[list[int]] = []
        self.cancelled = 0
        self.go = asyncio.Event()
        self.go.set()
        self.failure: Exception | None = None
        self.pause_s = 0.0
        self.whole = False
        """Whether a call is answered in one piece."""
        self.arrived: list[int] = []
        """For each call answered in one piece, how many calls had arrived by then."""
        self._turn = asyncio.Lock()

    async def __call__(self, requests: Requests, deliver: Callable[[Piece], None]) -> None:
        items = requests.items
        assert len(items) == len(requests.timeouts_s)
        assert all(0 <= timeout_s <= 5 for timeout_s in requests.timeouts_s)
        self.calls.append(items)
        self.backlogs.append(requests.backlog)
        self.callers.add(requests.caller)
        self.numbers |= dict(zip(requests.numbers, items, strict=True))
        self.taken_back.append([self.numbers[number] for number in requests.taken_back])
        try:
            async with self._turn:
                await asyncio.wait_for(self.go.wait(), 5)
                await self._answer(dict(zip(requests.numbers, items, strict=True)), deliver)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _answer(self, items: dict[int, Any], deliver: Callable[[Piece], None]) -> None:
        if self.failure:
            raise self.failure
        if self.whole:
            await asyncio.sleep(self.pause_s * len(items))
            self.arrived.append(len(self.calls))
            deliver(Piece(list(items), [item * 10 for item in items.values()], {}))
            return
        for number, item in items.items():
            if item < 0:
                deliver(Piece([], [], {number: Refusal(f"{item} is negative")}))
            else:
                deliver(Piece([number], [item * 10], {}))
            await asyncio.sleep(self.pause_s)


class Told(Following):
    """A follower that keeps all it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Progress] = []

    def report(self, progress: Progress) -> None:
        self.all.append(progress)


def run(
    scenario: Callable[[Coalescer, Replica], Coroutine[Any, Any, None]], replicas: int = 1, in_steps: bool = False
) -> Replica:
    async def main() -> Replica:
        replica = Replica()
        coalescer = Coalescer(replica, lambda: 8, lambda: replicas, lambda: in_steps)
        coalescer.start()
        await scenario(coalescer, replica)
        await asyncio.sleep(0.01)
        assert coalescer.waiting == 0
        return replica

    return asyncio.run(main())


def ask(coalescer: Coalescer, *items: int, timeout_s: float = 5, **tenant: Any) -> asyncio.Task[Answers]:
    return asyncio.create_task(coalescer.ask(list(items), timeout_s, **tenant))


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the condition was never met")


async def held(coalescer: Coalescer, replica: Replica, *requests: tuple[int, ...]) -> list[asyncio.Task[Answers]]:
    """Make requests while two calls of one item keep the replica busy. The tasks of those two come first."""
    replica.go.clear()
    tasks = []
    for items in [(1,), (2,), *requests]:
        tasks.append(ask(coalescer, *items))
        await asyncio.sleep(0.01)
    return tasks


async def learned(coalescer: Coalescer, replica: Replica) -> None:
    """Let the coalescer measure how long calls of several sizes take."""
    replica.pause_s, replica.whole = 0.02, True
    for size in (1, 3, 8):
        await ask(coalescer, *range(size))


def test_what_waits_leaves_as_one_call() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = await held(coalescer, replica, (3,), (4, 5), (6,))
        assert coalescer.waiting == 4
        replica.go.set()
        assert [(await task).results for task in tasks] == [[10], [20], [30], [40, 50], [60]]

    replica = run(scenario)
    assert replica.calls == [[1], [2], [3, 6, 4, 5]], "the requests that are done soonest come first"
    assert replica.backlogs == [0, 0, 0]


def test_each_replica_has_its_own_calls() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = await held(coalescer, replica, (3,), (4,), (5,))
        assert coalescer.waiting == 1
        replica.go.set()
        await asyncio.gather(*tasks)

    assert run(scenario, replicas=2).calls == [[1], [2], [3], [4], [5]]


def test_a_long_list_shares_calls_with_short_requests() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = await held(coalescer, replica, tuple(range(100, 130)), (3,), (4,), (5,))
        replica.go.set()
        assert (await tasks[2]).results == [10 * number for number in range(100, 130)]
        await asyncio.gather(*tasks)

    calls = run(scenario).calls
    assert {3, 4, 5} <= set(calls[2])
    assert all(len(call) <= 8 for call in calls)


def test_two_long_requests_are_not_both_done_last() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = await held(coalescer, replica, tuple(range(100, 116)), tuple(range(200, 216)))
        replica.go.set()
        await asyncio.gather(*tasks)

    calls = run(scenario).calls
    assert list(itertools.chain(*calls[2:])) == [*range(100, 116), *range(200, 216)]


def test_tenants_take_turns_by_their_weight_however_much_one_has_waiting() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = await held(coalescer, replica, *((number,) for number in range(100, 150)))
        tasks += [ask(coalescer, number, tenant="small") for number in range(20, 35)]
        tasks += [ask(coalescer, number, tenant="b", weight=3.0) for number in range(40, 100)]
        await asyncio.sleep(0.01)
        replica.go.set()
        await asyncio.gather(*tasks)

    calls = run(scenario).calls
    served = list(itertools.chain(*calls[2:]))
    for items in (50, 75):
        of_small, of_b = (sum(low <= item < high for item in served[:items]) for low, high in [(20, 35), (40, 100)])
        assert abs(of_small - items / 5) <= 8, "apart from the turns it was owed at first"
        assert abs(of_b - items * 3 / 5) <= 8
    assert [item for item in served if item >= 100] == list(range(100, 150))


def test_all_of_a_tenants_small_request_is_in_the_next_call() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = await held(coalescer, replica, *(tuple(range(at, at + 8)) for at in range(100, 180, 8)))
        tasks.append(ask(coalescer, *range(20, 26), tenant="small"))
        await asyncio.sleep(0.01)
        replica.go.set()
        await asyncio.gather(*tasks)

    assert set(range(20, 26)) <= set(run(scenario).calls[2])


def test_tenants_with_new_names_do_not_starve_one_that_waits() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        replica.pause_s = 0.001
        waits = [ask(coalescer, *range(100, 116), tenant="waits")]
        for number in range(400):  # faster than they are served
            waits.append(ask(coalescer, number, tenant=f"new {number}"))
            if number % 4 == 3:
                await asyncio.sleep(0.003)
        await asyncio.gather(*waits)

    served = list(itertools.chain(*run(scenario).calls))
    assert served.index(115) < 400, "however many new tenants come"


def test_a_request_is_not_split_if_a_smaller_call_is_as_fast_per_item() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        await learned(coalescer, replica)
        tasks = [ask(coalescer, *range(at, at + size)) for at, size in [(10, 5), (20, 5), (30, 20)]]
        await asyncio.gather(*tasks)

    calls = run(scenario).calls
    assert calls[3] == list(range(10, 15))
    assert calls[4] == [*range(20, 25), 30, 31, 32], "one that fits into no call is split anyway"
    assert [len(call) for call in calls[5:]] == [8, 8, 1]


def test_a_call_leaves_just_in_time_so_that_newcomers_can_still_join_it() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        await learned(coalescer, replica)
        tasks = [ask(coalescer, *range(100, 140))]
        await asyncio.sleep(0.05)  # less than the 0.16 s that the call under way takes
        tasks.append(ask(coalescer, 7, tenant="small"))
        await asyncio.gather(*tasks)

    calls = run(scenario).calls
    assert 7 in calls[4], "the call after the one under way"


def test_a_call_that_fills_up_late_leaves_just_in_time_too() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        replica.pause_s, replica.whole = 0.06, True
        for size in (1, 3, 8):
            coalescer.cost.observe(size, 0.03 * size)  # half of what they take, so that calls leave early
        tasks = []
        for items in (range(100, 108), range(10, 13), range(20, 28)):
            tasks.append(ask(coalescer, *items))
            await asyncio.sleep(0.01)
        await asyncio.gather(*tasks)

    assert run(scenario).arrived[0] == 2, "the second left before the first was over"


def test_a_model_without_replicas_is_sent_its_calls_at_once() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        await learned(coalescer, replica)
        replica.go.clear()
        coalescer.replicas = lambda: 0
        tasks = [ask(coalescer, *range(100, 116))]
        await asyncio.sleep(0.01)
        assert len(replica.calls) == 5
        replica.go.set()
        await asyncio.gather(*tasks)

    run(scenario)


def test_a_follower_is_told_of_each_step_forward_and_of_the_start() -> None:
    one, several = Told(), Told()

    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = await held(coalescer, replica, *((number,) for number in range(10, 25)))
        tasks.append(ask(coalescer, 40, 41, 42, tenant="other", following=several))
        await asyncio.sleep(0.01)
        tasks.append(ask(coalescer, 30, following=one))
        await asyncio.sleep(0.01)
        replica.pause_s = 0.001
        replica.go.set()
        await asyncio.gather(*tasks)

    run(scenario)
    places = [each.place for each in one.all if each.place]
    assert places[0] == 2 + 15 + 3 + 1
    assert places == sorted(places, reverse=True)
    assert len(set(places)) > 2
    assert [each.state for each in one.all][-1:] == ["running"]
    running = [(each.done, each.items) for each in several.all if each.state == "running"]
    assert (running[0], running[-1]) == ((0, 3), (3, 3))


def test_each_of_several_replicas_gets_a_second_call_to_prepare_at_once() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        await learned(coalescer, replica)
        everything = ask(coalescer, *range(100, 140))
        await asyncio.sleep(0.05)  # less than the 0.16 s that a call takes
        assert [len(call) for call in replica.calls[3:]] == [8] * 4
        await everything

    run(scenario, replicas=2)


def test_a_request_whose_client_left_while_it_waited_is_never_sent() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = await held(coalescer, replica, (3, 4), (5,))
        tasks[2].cancel()
        await asyncio.sleep(0.01)
        assert coalescer.waiting == 1
        replica.go.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    assert run(scenario).calls == [[1], [2], [5]]


def test_a_call_that_nobody_waits_for_is_cancelled() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = await held(coalescer, replica)
        tasks[1].cancel()
        await asyncio.sleep(0.01)
        assert replica.cancelled == 1
        replica.go.set()
        assert (await tasks[0]).results == [10]

    run(scenario)


def test_a_crowd_that_leaves_at_any_moment_holds_up_nobody() -> None:
    draw = random.Random(0)

    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        crowd = []
        for _ in range(draw.randint(1, 12)):
            crowd.append(ask(coalescer, *range(draw.randint(1, 6))))
            for _ in range(draw.randint(0, 3)):
                await asyncio.sleep(0)
        for _ in range(draw.randint(0, 6)):
            await asyncio.sleep(0)
        for client in draw.sample(crowd, len(crowd)):
            client.cancel()
        assert (await ask(coalescer, 7, timeout_s=1)).results == [70]

    for _ in range(100):
        run(scenario)


def test_a_deadline_also_passes_while_waiting() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = await held(coalescer, replica)
        late = ask(coalescer, 3, timeout_s=0.02)
        with pytest.raises(TimeoutError):
            await late
        replica.go.set()
        await asyncio.gather(*tasks)

    assert run(scenario).calls == [[1], [2]]


def test_refusals_reach_the_request_at_fault_alone() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = await held(coalescer, replica, (3, -4, 5), (6,))
        replica.go.set()
        answers = await tasks[2]
        assert answers.refusals == {1: Refusal("-4 is negative")}
        assert (answers.results[0], answers.results[2]) == (30, 50)
        assert (await tasks[3]).results == [60]
        await asyncio.gather(*tasks)

    run(scenario)


def test_a_call_that_fails_fails_its_requests_and_the_next_succeeds() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        replica.failure = RuntimeError("lost")
        for _ in range(3):
            with pytest.raises(RuntimeError, match="lost"):
                await ask(coalescer, 1, 2)
        replica.failure = None
        assert (await ask(coalescer, 1, 2)).results == [10, 20]

    run(scenario)


def test_answers_do_not_wait_for_the_rest_of_their_call() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = await held(coalescer, replica, (3,), (4, 5), (6,))
        replica.pause_s = 0.05
        replica.go.set()
        assert (await tasks[2]).results == [30]
        assert not tasks[4].done()
        assert (await tasks[4]).results == [60]
        assert not tasks[3].done()
        assert (await tasks[3]).results == [40, 50]

    assert run(scenario).calls[2] == [3, 6, 4, 5]


def test_requests_wait_for_one_call_if_two_in_a_row_would_be_slower() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        replica.pause_s = 0.05
        for number in range(3):  # learns what an item takes
            await ask(coalescer, number)
        tasks = []
        for number in range(3, 8):
            tasks.append(ask(coalescer, number))
            await asyncio.sleep(0.002)
        await asyncio.gather(*tasks)

    calls = run(scenario).calls
    assert len(calls) == 5
    assert sorted(number for call in calls[3:] for number in call) == [3, 4, 5, 6, 7]


def test_calls_to_an_engine_in_steps_leave_at_once_while_there_is_room() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = await held(coalescer, replica, (3,), (4, 5))
        await until(lambda: replica.calls == [[1], [2], [3], [4, 5]])  # no call waits for another
        tasks += [ask(coalescer, *range(10, 15)), ask(coalescer, 20)]
        await until(lambda: sum(map(len, replica.calls)) == 8)
        await asyncio.sleep(0.05)
        assert sum(map(len, replica.calls)) == 8, "no more items under way than a batch holds"
        assert coalescer.waiting == 3
        replica.go.set()
        assert [len((await task).results) for task in tasks] == [1, 1, 1, 2, 5, 1]

    run(scenario, in_steps=True)


def test_requests_made_at_once_leave_in_few_calls_to_an_engine_in_steps() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = [ask(coalescer, number) for number in range(40)]
        assert [(await task).results for task in tasks] == [[10 * number] for number in range(40)]
        assert len(replica.calls) <= 12

    run(scenario, in_steps=True)


def test_an_overtaken_request_to_an_engine_in_steps_is_taken_back() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = await held(coalescer, replica, (3,))
        tasks[2].cancel()
        await asyncio.sleep(0.01)
        assert replica.cancelled == 1
        replica.go.set()
        assert (await tasks[0]).results == [10]

    run(scenario, in_steps=True)


def test_items_that_share_a_call_are_taken_back_with_the_next_call() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        replica.go.clear()
        first, left, stays = ask(coalescer, 1), ask(coalescer, 5, 6), ask(coalescer, 7)
        await asyncio.sleep(0.02)
        left.cancel()
        await asyncio.sleep(0.01)
        newer = ask(coalescer, 8)
        await asyncio.sleep(0.02)
        assert replica.calls == [[1, 7, 5, 6], [8]]
        assert replica.taken_back == [[], [5, 6]]
        assert replica.cancelled == 0
        replica.go.set()
        assert [(await task).results for task in (first, stays, newer)] == [[10], [70], [80]]

    run(scenario, in_steps=True)


def test_each_coalescer_has_a_name_of_its_own() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        for item in range(3):
            await ask(coalescer, item)

    [one], [another] = run(scenario).callers, run(scenario).callers
    assert one
    assert another
    assert one != another


def test_calls_are_filled_by_turns_not_by_items() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        long = asyncio.create_task(coalescer.ask([1, 2, 3, 4, 5], 5, turns=[4] * 5))
        await asyncio.sleep(0.01)
        short = ask(coalescer, 6, 7)
        assert (await short).results == [60, 70]
        assert (await long).results == [10, 20, 30, 40, 50]

    assert run(scenario).calls[0] == [1, 2]


def test_an_item_of_more_turns_than_a_call_holds_is_sent_all_the_same() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        asked = [coalescer.ask([number, number + 1], 5, turns=[20, 1]) for number in (1, 3)]
        assert [each.results for each in await asyncio.gather(*asked)] == [[10, 20], [30, 40]]

    assert sorted(itertools.chain(*run(scenario).calls)) == [1, 2, 3, 4]


def test_a_tenant_with_long_texts_is_done_after_one_with_as_many_short_texts() -> None:
    """Tenants share turns, not items."""

    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = await held(coalescer, replica)
        long = [coalescer.ask([number], 5, tenant="long", turns=[8]) for number in range(10, 16)]
        short = [coalescer.ask([number], 5, tenant="short", turns=[1]) for number in range(20, 26)]
        asked = [asyncio.create_task(each) for each in (*long, *short)]
        await asyncio.sleep(0.01)
        replica.go.set()
        await asyncio.gather(*asked, *tasks)

    order = list(itertools.chain(*run(scenario).calls))
    assert order.index(25) < order.index(12)


def test_a_client_that_leaves_gives_back_the_turns_it_has_not_had() -> None:
    async def scenario(coalescer: Coalescer, replica: Replica) -> None:
        tasks = await held(coalescer, replica)
        gone = asyncio.create_task(coalescer.ask([3, 4], 5, turns=[5, 5]))
        await asyncio.sleep(0.01)
        assert coalescer.waiting == 10
        gone.cancel()
        await asyncio.sleep(0.01)
        assert coalescer.waiting == 0
        replica.go.set()
        await asyncio.gather(*tasks)

    assert run(scenario).calls == [[1], [2]]


LONG = "The deposit is returned within 14 days. " * 5000


@pytest.mark.parametrize(
    ("request_", "max_tokens", "expected"),
    [
        (Text("A lease."), 256, 1),
        (Text(LONG), 256, 5),
        (Text(LONG), 512, 9),
        (Text(LONG), None, 9),
        (Text("두레는 마을의 품앗이다. " * 20), 256, 3),
        (Text(list(range(200))), 256, 4),
        (Pair("rain", "It rains."), 512, 1),
        (Pair(LONG, "a"), 512, 9),
        (Pair("a" * 300, "b" * 300), 512, 3),
        (Prompt(LONG), 128, 1),
        ({"say": LONG}, None, 1),
        (Text("\ud800" * 300), 256, 2),
    ],
)
def test_turns_follow_the_text_that_a_model_reads(request_: Any, max_tokens: int | None, expected: int) -> None:
    assert turns(request_, max_tokens) == expected
