from __future__ import annotations

import asyncio
import contextlib
import pickle
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments.load_progress import LoadEvent
from deployments.messages import Answers, Piece, Requests
from serve import errors
from serve.board.reports import Replica
from serve.board.watch import Watch
from serve.caller import Caller
from serve.calls.model import Model
from serve.config.model import ModelSettings
from serve.errors import DureError
from serve.queues.gate import Gate
from serve.queues.tickets import Refused


def run(scenario: Callable[[Gate], Coroutine[Any, Any, None]], max_items: int = 4) -> None:
    async def main() -> None:
        gate = Gate("m", max_items)
        await scenario(gate)
        assert gate.turns == 0

    asyncio.run(main())


def test_a_full_queue_refuses_with_the_time_to_come_back() -> None:
    async def scenario(gate: Gate) -> None:
        gate.tickets.pace.seconds_per_turn = 2.0
        async with gate.admitted(3), gate.admitted(1):
            with pytest.raises(DureError) as caught:
                async with gate.admitted(1):
                    pass
            assert caught.value.status == 429
            assert caught.value.headers["Retry-After"] == "10"  # three of four are served by then, and this one
        async with gate.admitted(4):
            pass

    run(scenario)


def test_a_list_gets_in_whole_while_there_is_room_for_one() -> None:
    async def scenario(gate: Gate) -> None:
        async with gate.admitted(3), gate.admitted(100):
            assert gate.turns == 103
            with pytest.raises(DureError):
                async with gate.admitted(1):
                    pass

    run(scenario)


def test_a_tenant_has_its_share_of_a_queue_that_another_has_filled() -> None:
    async def scenario(gate: Gate) -> None:
        async with contextlib.AsyncExitStack() as stack:

            async def enter(tenant: str) -> None:
                await stack.enter_async_context(gate.admitted(1, caller=Caller.waiting(5, tenant)))

            for tenant in ["flood"] * 4 + ["small"] * 2:
                await enter(tenant)
            for tenant in ("flood", "small"):
                with pytest.raises(DureError) as caught:
                    await enter(tenant)
                assert caught.value.status == 429
                assert caught.value.ticket
            for number in range(9):  # names are cheap: they get no more than twice the queue
                with contextlib.suppress(DureError):
                    await enter(f"new{number}")
            assert 6 < gate.turns <= 8

    run(scenario)


def test_a_list_longer_than_the_queue_leaves_another_tenant_its_share() -> None:
    async def scenario(gate: Gate) -> None:
        flood, small = (Caller.waiting(5, tenant) for tenant in ("flood", "small"))
        async with gate.admitted(100, caller=flood), gate.admitted(1, caller=small):
            assert gate.turns == 101

    run(scenario)


def test_the_patient_wait_for_room_and_give_up_in_time() -> None:
    async def scenario(gate: Gate) -> None:
        entered = asyncio.Event()

        async def patient() -> None:
            async with gate.admitted(2, patience_s=5):
                entered.set()

        async with gate.admitted(4):
            waiting = asyncio.create_task(patient())
            await asyncio.sleep(0.02)
            assert not entered.is_set()
            with pytest.raises(DureError):
                async with gate.admitted(1, patience_s=0.05):
                    pass
        await waiting
        assert entered.is_set()

    run(scenario)


def test_a_failed_call_gives_its_place_back() -> None:
    async def scenario(gate: Gate) -> None:
        for _ in range(3):
            with pytest.raises(RuntimeError):
                async with gate.admitted(1):
                    raise RuntimeError

    run(scenario, 1)


def test_retry_after_is_whole_seconds_and_at_least_one() -> None:
    assert errors.at_capacity("m").headers == {"Retry-After": "1"}
    assert DureError(503, "k", "m", None, 7.2).headers == {"Retry-After": "8"}
    assert errors.invalid("no").headers == {}


def test_errors_survive_the_way_between_processes() -> None:
    error = Refused(3, 8, "a-ticket").error("m")
    again = pickle.loads(pickle.dumps(error))
    assert (again.status, again.kind, str(again), again.headers) == (429, "queue_full", str(error), error.headers)


@pytest.mark.parametrize(("state", "kind"), [("loading", "loading"), ("failed", "model_failed")])
def test_a_model_that_does_not_come_up_is_waited_for_only_so_long(state: str, kind: str) -> None:
    class Watch:
        def state(self, model: str) -> str:
            return state

        async def settled(self, model: str, timeout_s: float) -> str:
            await asyncio.sleep(timeout_s)
            return state

        def reason(self, model: str) -> str:
            return "its checkpoint is damaged"

        def parallel(self, model: str) -> int:
            return 1

        def max_tokens(self, model: str) -> None:
            return None

    async def main() -> None:
        watch: Any = Watch()
        handle: Any = None
        settings = ModelSettings(task="embedding", source="x")
        model = Model("m", settings, handle, patient=False, watch=watch, load_wait_s=0.05, weights={})
        started = time.monotonic()
        with pytest.raises(DureError) as caught:
            await model.ask(["a"], Caller.waiting(30))
        assert (caught.value.status, caught.value.kind) == (503, kind)
        assert int(caught.value.headers["Retry-After"]) >= 1
        assert time.monotonic() - started < 5
        assert model.gate.turns == 0

    asyncio.run(main())


class Dying:
    """A handle whose replica dies whatever call has one of these items, and of calls that are made of it."""

    def __init__(self, *deadly: str) -> None:
        self.deadly = set(deadly)
        self.calls: list[list[str]] = []

    def options(self, stream: bool) -> Any:
        return self

    @property
    def run(self) -> Any:
        return self

    def remote(self, requests: Requests) -> Any:
        self.calls.append(requests.items)
        return Answered(self, requests)


class Answered:
    def __init__(self, handle: Dying, requests: Requests) -> None:
        self.handle = handle
        self.requests = requests

    async def __aiter__(self) -> Any:
        for number, item in zip(self.requests.numbers, self.requests.items, strict=True):
            if item in self.handle.deadly:
                raise RayActorError
            yield Piece([number], [item.upper()], {})

    def cancel(self) -> None:
        pass


def answers_of(handle: Any, items: list[str]) -> Answers:
    async def main() -> Answers:
        watch = Watch()
        watch.replicas = {("m", "1"): Replica("m", "m#1", LoadEvent("ready", 100, "Ready", "준비됨"), {"version": "1"})}
        settings = ModelSettings(task="embedding", source="x")
        model = Model("m", settings, handle, patient=False, watch=watch, load_wait_s=1, weights={})
        model.coalescer.start()
        return await model.ask(items, Caller.waiting(30))

    return asyncio.run(main())


@pytest.mark.parametrize("deadly", [["b"], ["a"], ["d"], ["b", "d"]])
def test_of_a_call_whose_replica_died_only_what_is_deadly_fails(deadly: list[str]) -> None:
    handle = Dying(*deadly)
    items = ["a", "b", "c", "d"]
    answers = answers_of(handle, items)
    assert {items[place]: refusal.kind for place, refusal in answers.refusals.items()} == dict.fromkeys(
        deadly, "failed"
    )
    for item in items:
        assert sum(item in call for call in handle.calls) <= 2, "nothing is given to a third replica"


def test_what_was_answered_before_a_replica_died_is_not_asked_again() -> None:
    handle = Dying("c")
    answers_of(handle, ["a", "b", "c", "d"])
    assert handle.calls == [["a", "b", "c", "d"], ["c"], ["d"]]
