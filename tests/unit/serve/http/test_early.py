"""Refusals from a request's head alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest

from serve.caller import Caller
from serve.calls.graph import Graph
from serve.errors import DureError
from serve.http.early import Calls, refuse_early
from serve.queues.gate import Gate
from tests.ingress import make_graph

TWO = {name: {"task": "embedding", "source": "x", "max_queue": 2} for name in ("one", "two")}
EMBEDDING, RUN = Calls(task="embedding"), Calls(model="name")


def run(scenario: Callable[[Graph], Coroutine[Any, Any, None]], **settings: Any) -> None:
    async def main() -> None:
        await scenario(make_graph(**settings))

    asyncio.run(asyncio.wait_for(main(), 20))


async def fill(stack: AsyncExitStack, *gates: Gate) -> None:
    for gate in gates:
        await stack.enter_async_context(gate.admitted(gate.max_turns))


def refused(graph: Graph, calls: Calls, caller: Caller | None = None, **parts: str) -> DureError | None:
    try:
        refuse_early(graph, calls, parts, caller or Caller.waiting(5))
    except DureError as error:
        return error
    return None


def test_where_there_is_room_nobody_is_refused() -> None:
    async def scenario(graph: Graph) -> None:
        for calls in (EMBEDDING, Calls(task="nothing"), Calls(service="search"), Calls(service="nothing")):
            assert refused(graph, calls) is None
        assert refused(graph, RUN, name="shout") is refused(graph, RUN, name="nobody") is None

    run(scenario)


@pytest.mark.parametrize(("calls", "parts"), [(EMBEDDING, {}), (RUN, {"name": "embedder"})])
def test_a_full_queue_refuses_with_a_ticket(calls: Calls, parts: dict[str, str]) -> None:
    async def scenario(graph: Graph) -> None:
        gate = graph.models["embedder"].gate
        async with AsyncExitStack() as stack:
            await fill(stack, gate)
            error = refused(graph, calls, **parts)
            assert error
            assert (error.status, error.kind) == (429, "queue_full")
            assert error.ticket
            assert gate.rejected == 1
            with_ticket = Caller.waiting(5, ticket=error.ticket)
            assert refused(graph, calls, with_ticket, **parts) is None
        assert refused(graph, calls, Caller.waiting(5, tenant="other"), **parts) is None

    run(scenario)


def test_a_tenant_with_room_in_its_share_is_not_refused() -> None:
    async def scenario(graph: Graph) -> None:
        gate = graph.models["embedder"].gate
        async with gate.admitted(gate.max_turns, caller=Caller.waiting(5, "flood")):
            assert refused(graph, EMBEDDING, Caller.waiting(5, "flood"))
            assert refused(graph, EMBEDDING, Caller.waiting(5, "small")) is None

    run(scenario)


def test_a_ticket_reserves_what_a_request_usually_has() -> None:
    async def scenario(graph: Graph) -> None:
        gate = graph.models["embedder"].gate
        for _ in range(100):
            async with gate.admitted(32):
                pass
        async with AsyncExitStack() as stack:
            await fill(stack, gate)
            assert refused(graph, EMBEDDING)
        assert 30 <= sum(gate.tickets._turns.values()) <= 32

    run(scenario)


def test_without_tickets_left_newcomers_hear_the_same_one_behind_the_other() -> None:
    async def scenario(graph: Graph) -> None:
        gate = graph.models["embedder"].gate
        gate.tickets.pace.seconds_per_turn = 100
        async with AsyncExitStack() as stack:
            await fill(stack, gate)
            heard = [refused(graph, EMBEDDING)]
            gate.tickets.refuse = None  # type: ignore[assignment,method-assign]  # is not asked again
            heard += [refused(graph, EMBEDDING) for _ in range(4)]
            assert all(error and error.ticket is None for error in heard)
            times = [int(error.headers["Retry-After"]) for error in heard if error]
            assert times == sorted(times)
            assert times[0] > 60
            assert gate.full(Caller.waiting(5))
            assert not gate.full(Caller.waiting(5, "other"))
            assert not gate.full(Caller.waiting(5, ticket="mine"))
            assert gate.rejected == 5

    run(scenario)


def test_of_several_models_all_have_to_be_full_and_no_ticket_is_given() -> None:
    async def scenario(graph: Graph) -> None:
        one, two = (graph.models[name].gate for name in ("one", "two"))
        one.tickets.pace.seconds_per_turn = two.tickets.pace.seconds_per_turn = 100
        async with AsyncExitStack() as stack:
            await fill(stack, one)
            assert refused(graph, RUN, name="one")  # so that its refusal stands
            assert refused(graph, EMBEDDING) is None
            await fill(stack, two)
            assert refused(graph, EMBEDDING) is None, "nobody has asked the second yet"
            assert refused(graph, RUN, name="two")
            error = refused(graph, EMBEDDING)
            assert error
            assert (error.status, error.ticket) == (429, None)

    run(scenario, models=TWO)


def test_an_overloaded_machine_refuses_with_503() -> None:
    async def scenario(graph: Graph) -> None:
        graph.models["one"].gate.overload = lambda: "memory is at 95%"
        assert refused(graph, EMBEDDING) is None, "the other may be on another machine"
        graph.models["two"].gate.overload = lambda: "memory is at 95%"
        error = refused(graph, EMBEDDING)
        assert error
        assert (error.status, error.kind) == (503, "overloaded")

    run(scenario, models=TWO)


def test_answers_that_may_be_known_are_looked_for_first() -> None:
    calls = Calls(task="next_word", cached=True)

    async def scenario(graph: Graph) -> None:
        graph.models["predictor"].gate.overload = lambda: "memory is at 95%"
        assert refused(graph, calls)
        graph.predictions.cache = any_cache()
        assert refused(graph, calls) is None

    run(scenario)


def any_cache() -> Any:
    return object()


def test_a_full_lane_refuses_once_admission_has_said_so() -> None:
    async def scenario(graph: Graph) -> None:
        from serve.queues.client import Full
        from serve.queues.tickets import Refused

        calls, until = Calls(service="search"), asyncio.get_running_loop().time() + 1e9
        graph.lanes._full["search", "default"] = Full(Refused(9, 70, None, 1.0, 0.5), until)
        errors = [refused(graph, calls) for _ in range(3)]
        assert [error and error.headers["Retry-After"] for error in errors] == ["71", "72", "73"]
        assert refused(graph, calls, Caller.waiting(5, "other")) is None
        assert refused(graph, Calls(service="search", queued=False)) is None

    run(scenario)
