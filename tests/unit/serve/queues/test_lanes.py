"""Lanes: who begins, who waits, who is refused, and what a ticket is worth."""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from serve.caller import Caller
from serve.errors import DureError
from serve.queues import admission, client
from serve.queues import lane as lane_module
from serve.queues import pace as pace_module
from serve.queues.admission import Admission, LaneReply, LaneReport
from serve.queues.lane import Asked, Entry, Lane
from serve.queues.tickets import FOR_TICKETS, HELD_S, LONGEST_S, MAX_WAIT_S, VALID_S, Refused, Tickets

KEY = b"k" * 32
NUMBERS = itertools.count()


def asked(tenant: str = "a", **more: Any) -> Asked:
    known = {"id": str(next(NUMBERS)), "holder": "ingress", "timeout_s": 30.0, "max_concurrent": 2, "max_queue": 4}
    return Asked(lane="search", tenant=tenant, **{**known, **more})


def run(scenario: Callable[[Lane], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await scenario(Lane("search", KEY))

    asyncio.run(asyncio.wait_for(main(), 30))


def said(entry: Entry) -> Any:
    return entry.decision.result() if entry.decision.done() else "waiting"


def refusal(entry: Entry) -> Refused:
    decision = said(entry)
    assert isinstance(decision, Refused)
    return decision


def test_so_many_run_so_many_wait_and_the_next_is_refused_at_once() -> None:
    async def scenario(lane: Lane) -> None:
        entries = [lane.enter(asked()) for _ in range(7)]
        assert [said(entry) for entry in entries[:6]] == ["admitted"] * 2 + ["waiting"] * 4
        assert refusal(entries[6]).retry_after_s >= 1
        lane.leave(entries[0])
        assert said(entries[2]) == "admitted"
        assert said(entries[3]) == "waiting"
        standing = lane.standing()
        assert (standing.running, standing.waiting, standing.rejected) == (2, 3, 1)

    run(scenario)


def test_who_waits_knows_the_place_and_who_leaves_makes_room() -> None:
    async def scenario(lane: Lane) -> None:
        lane.tickets.pace.seconds_per_turn = 2.0
        running = [lane.enter(asked()) for _ in range(2)]
        first, second, third = (lane.enter(asked()) for _ in range(3))
        assert lane.places()[second.asked.id] == (2, 4.0)
        lane.leave(first)
        assert said(first) == "gone"
        assert lane.places() == {second.asked.id: (1, 2.0), third.asked.id: (2, 4.0)}
        lane.leave(running[0])
        assert said(second) == "admitted"

    run(scenario)


def test_what_is_too_late_is_not_begun() -> None:
    async def scenario(lane: Lane) -> None:
        running = [lane.enter(asked()) for _ in range(2)]
        late, in_time = lane.enter(asked(timeout_s=0.01)), lane.enter(asked())
        await asyncio.sleep(0.02)
        lane.leave(running[0])
        assert said(late) == "late"
        assert said(in_time) == "admitted"
        waiting = lane.enter(asked(timeout_s=0.01))
        await asyncio.sleep(0.02)
        lane.expire()
        assert said(waiting) == "late"

    run(scenario)


def test_tenants_take_turns_by_their_weight() -> None:
    async def scenario(lane: Lane) -> None:
        more = {"max_queue": 100, "max_concurrent": 1}
        running = lane.enter(asked(**more))
        for _ in range(30):
            lane.enter(asked("flood", **more))
        for _ in range(20):
            lane.enter(asked("small", **more))
            lane.enter(asked("important", weight=2, **more))
        foreseen = [entry.tenant for entry in lane.queue]
        order = []
        for _ in range(40):
            lane.leave(running)
            [running] = lane.running
            order.append(running.tenant)
        for tenant, turns in {"flood": 10, "small": 10, "important": 20}.items():
            assert abs(order.count(tenant) - turns) <= 1
            assert abs(foreseen[:40].count(tenant) - turns) <= 1
        assert order[:12].count("flood") <= 4

    run(scenario)


def test_a_full_queue_makes_room_for_a_tenant_that_has_less_than_its_share() -> None:
    async def scenario(lane: Lane) -> None:
        flood = [lane.enter(asked("flood")) for _ in range(8)]
        assert [said(entry) for entry in flood].count("waiting") == 4
        small = [lane.enter(asked("small")) for _ in range(3)]
        assert [said(entry) for entry in small[:2]] == ["waiting"] * 2
        assert isinstance(said(small[2]), Refused)  # half of the queue is its share
        assert [said(entry) for entry in flood[2:4]] == ["waiting"] * 2
        assert all(refusal(entry).ticket for entry in flood[4:])
        assert lane.standing().waiting == 4

    run(scenario)


def test_a_ticket_is_let_in_at_its_time_where_a_newcomer_is_not_and_once() -> None:
    async def scenario(lane: Lane) -> None:
        now = 1000.0
        lane.tickets.clock = lambda: now
        lane.tickets.pace.seconds_per_turn = 1.0
        entries = [lane.enter(asked()) for _ in range(6)]
        tickets = [refusal(lane.enter(asked())) for _ in range(3)]
        assert [refused.retry_after_s for refused in tickets] == [5, 7, 8]  # at four fifths of the pace
        early = refusal(lane.enter(asked(ticket=tickets[0].ticket)))
        assert (early.ticket, early.retry_after_s) == (tickets[0].ticket, 5)
        now += 5
        for entry in entries[:2]:
            lane.leave(entry)
        lane.tickets.pace.seconds_per_turn = 1.0
        assert (lane.standing().running, lane.standing().waiting) == (2, 2)
        newcomer = lane.enter(asked())
        assert isinstance(said(newcomer), Refused)  # most of the queue is held for those who are to come now
        back = lane.enter(asked(ticket=tickets[0].ticket))
        assert said(back) == "waiting"
        assert lane.places()[back.asked.id][0] == 3  # nobody who waits is overtaken
        lane.leave(entries[2])
        again = lane.enter(asked(ticket=tickets[0].ticket))
        assert again.has_ticket is False

    run(scenario)


@pytest.mark.parametrize("tenants", [1, 5, 40])
def test_tickets_are_worth_the_same_however_many_tenants_there_are(
    tenants: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times what can be borne for 10 minutes; all come back at their time."""
    now, service_s, draw = 1000.0, 2.0, random.Random(0)
    monkeypatch.setattr(lane_module, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(pace_module, "time", SimpleNamespace(monotonic=lambda: now))

    async def scenario(lane: Lane) -> None:
        nonlocal now
        lane.tickets.clock = lambda: now
        coming = [(now + number / 4, number, f"tenant{draw.randrange(tenants)}", None) for number in range(2400)]
        ends: list[tuple[float, Entry]] = []
        entries: list[Entry] = []
        let_in: Counter[bool] = Counter()
        back = 0
        while coming:
            at, _, tenant, ticket = heapq.heappop(coming)
            for end, entry in sorted(ends, key=lambda pair: pair[0]):
                if end <= at:
                    now = end
                    ends.remove((end, entry))
                    lane.leave(entry)
                    ends += [(now + service_s, each) for each in lane.running - {running for _, running in ends}]
            now = at
            back += ticket is not None
            entries.append(lane.enter(asked(tenant, ticket=ticket, max_queue=10, timeout_s=1e6)))
            ends += [(now + service_s, each) for each in lane.running - {running for _, running in ends}]
            for entry in [entry for entry in entries if entry.decision.done()]:
                entries.remove(entry)
                decision = said(entry)
                if not isinstance(decision, Refused):
                    let_in[entry.asked.ticket is not None] += 1
                elif (again := now + decision.retry_after_s) < 1600:
                    heapq.heappush(coming, (again, next(NUMBERS) + 10_000, entry.tenant, decision.ticket))
        assert back > 300
        assert let_in[True] > 0.9 * back
        assert let_in.total() > 0.9 * 600

    run(scenario)


def test_what_has_not_been_served_tells_of_the_pace_as_well() -> None:
    async def scenario(lane: Lane) -> None:
        for entry in [lane.enter(asked()) for _ in range(6)]:
            if entry.admitted_at is not None:
                entry.admitted_at -= 40
        assert refusal(lane.enter(asked())).retry_after_s >= 20 * 4
        assert lane.standing().estimated_wait_s >= 20 * 4

    run(scenario)


@pytest.mark.parametrize("ticket", ["", "no ticket", "AAAA", "é", "A" * 44, "A" * 10_000])
def test_what_is_no_ticket_is_a_newcomer(ticket: str) -> None:
    assert not Tickets("search", KEY).redeem(ticket, "a")


def test_a_ticket_is_good_for_its_tenant_and_queue_and_for_a_while() -> None:
    now = 5.0
    tickets = Tickets("search", KEY, lambda: now)
    ticket = tickets.refuse("a", 1, 0).ticket
    now += 1
    assert not tickets.redeem(ticket, "b")
    assert not Tickets("chat", KEY, lambda: now).redeem(ticket, "a")
    assert not Tickets("search", b"another", lambda: now).redeem(ticket, "a")
    elsewhere = Tickets("search", KEY, lambda: now)
    assert elsewhere.redeem(ticket, "a")
    assert not elsewhere.redeem(ticket, "a")
    now += VALID_S + 1
    assert not tickets.redeem(ticket, "a")
    assert tickets.outstanding == 0


def test_times_to_come_back_follow_each_other_and_end_somewhere() -> None:
    tickets = Tickets("search", KEY, lambda: 0.0)
    tickets.pace.seconds_per_turn = 1.0
    refusals = [tickets.refuse("a", 4, 0) for _ in range(100)]
    assert [refused.retry_after_s for refused in refusals[:3]] == [7, 8, 9]  # a fifth is for newcomers
    promised = [refused for refused in refusals if refused.ticket]
    assert 0.7 * MAX_WAIT_S < len(promised) <= FOR_TICKETS * MAX_WAIT_S
    assert max(refused.retry_after_s for refused in promised) == MAX_WAIT_S
    others = [refused.retry_after_s for refused in refusals[len(promised) :]]  # behind those, and no crowd either
    assert others[:4] == [62, 63, 64, 65]
    assert others == sorted(others)
    assert {tickets.refuse("a", 4, 0).retry_after_s for _ in range(300)} >= {LONGEST_S}


def test_who_never_comes_back_is_not_waited_for() -> None:
    now = 0.0
    tickets = Tickets("search", KEY, lambda: now)
    tickets.pace.seconds_per_turn = 0.1
    for _ in range(200):
        tickets.refuse("a", 4, 0)
        now += VALID_S + 2
    assert tickets.returning < 0.1
    held = [tickets.refuse("a", 4, 0) for _ in range(20)]
    assert max(refused.retry_after_s for refused in held) == 1
    now += HELD_S
    assert tickets.coming(4, "a").turns == 0


def admitting(scenario: Callable[[Admission], Coroutine[Any, Any, None]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "SILENCE_S", 0.3)
    monkeypatch.setattr(admission, "SWEEP_S", 0.02)
    monkeypatch.setattr(admission, "BEAT_S", 0.1)
    monkeypatch.setattr(admission, "LEARN_S", 0.2)

    async def main() -> None:
        actor = Admission(KEY)
        await scenario(actor)
        if actor.sweeping:
            actor.sweeping.cancel()

    asyncio.run(asyncio.wait_for(main(), 30))


async def report(
    actor: Admission, running: Sequence[Asked] = (), waiting: Sequence[Asked] = (), holder: str = "ingress"
) -> LaneReply:
    return await actor.report(LaneReport(holder, list(running), [each.id for each in waiting], []))


def test_a_silent_holder_has_nothing_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(actor: Admission) -> None:
        one = {"max_concurrent": 1}
        assert await actor.enter(asked(holder="dead", **one)) == "admitted"
        alive = asked(**one)
        waiting = asyncio.ensure_future(actor.enter(alive))
        while not waiting.done():
            assert (await report(actor, waiting=[alive])).places.get(alive.id, (1, 0))[0] == 1
            await asyncio.sleep(0.02)
        assert waiting.result() == "admitted"

    admitting(scenario, monkeypatch)


def test_what_a_dead_holder_had_waiting_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(actor: Admission) -> None:
        one = {"holder": "dead", "max_concurrent": 1}
        assert await actor.enter(asked(**one)) == "admitted"
        waiting = [asyncio.ensure_future(actor.enter(asked(**one))) for _ in range(4)]
        assert await asyncio.gather(*waiting) == ["gone"] * 4

    admitting(scenario, monkeypatch)


def test_what_its_holder_does_not_know_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(actor: Admission) -> None:
        lost = asked(max_concurrent=1)
        assert await actor.enter(lost) == "admitted"
        while (await actor.queues())["lanes"]["search"]["running"]:
            await report(actor)
            await asyncio.sleep(0.02)

    admitting(scenario, monkeypatch)


def test_one_that_starts_anew_lets_nobody_in_before_it_knows_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(actor: Admission) -> None:
        newcomer, runs = asked(max_concurrent=1), asked(max_concurrent=1)
        entering = asyncio.ensure_future(actor.enter(newcomer))
        await asyncio.sleep(0.05)
        await report(actor, [runs], [newcomer])
        for _ in range(10):
            await asyncio.sleep(0.05)
            await report(actor, [runs], [newcomer])
        assert not entering.done()
        await actor.leave(runs.id)
        assert await entering == "admitted"

    admitting(scenario, monkeypatch)


def test_a_leave_that_overtakes_its_enter_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(actor: Admission) -> None:
        left = asked(max_concurrent=1)
        await actor.leave(left.id)
        assert await actor.enter(left) == "gone"
        assert await actor.enter(asked(max_concurrent=1)) == "admitted"
        twice = asked(max_concurrent=2)
        assert await actor.enter(twice) == "admitted"
        assert await actor.enter(dataclasses.replace(twice, timeout_s=1)) == "admitted"
        assert (await actor.queues())["lanes"]["search"]["running"] == 2

    admitting(scenario, monkeypatch)


def test_tenants_that_nobody_has_seen_do_not_starve_one_that_waits() -> None:
    async def scenario(lane: Lane) -> None:
        more = {"max_queue": 50, "max_concurrent": 1}
        lane.enter(asked("known", **more))
        lane.leave(next(iter(lane.running)))
        running = lane.enter(asked("first", **more))
        known = lane.enter(asked("known", **more))
        for number in range(4):
            lane.enter(asked(f"new{number}", **more))
            lane.leave(running)
            [running] = lane.running
        assert said(known) == "admitted"

    run(scenario)


def served(lane: Lane, entry: Entry) -> None:
    """It takes half a second."""
    assert entry.admitted_at is not None
    entry.admitted_at -= 0.5
    lane.leave(entry)


def test_a_slot_is_kept_for_who_comes_back_at_once_while_others_wait() -> None:
    async def scenario(lane: Lane) -> None:
        more = {"max_queue": 20}
        lane.enter(asked("flood", **more))
        small = lane.enter(asked("small", **more))
        waiting = [lane.enter(asked("flood", **more)) for _ in range(10)]
        served(lane, small)
        assert said(waiting[0]) == "admitted", "nobody knows yet that it comes back"
        small = lane.enter(asked("small", **more))
        served(lane, waiting[0])
        assert said(small) == "admitted"
        for _ in range(3):
            served(lane, small)
            assert said(waiting[1]) == "waiting"
            small = lane.enter(asked("small", **more))
            assert said(small) == "admitted"
        served(lane, small)
        await asyncio.sleep(0.1)
        assert said(waiting[1]) == "admitted", "it did not come back at once"

    run(scenario)


def test_slots_kept_are_no_more_than_a_tenants_share() -> None:
    async def scenario(lane: Lane) -> None:
        more = {"max_queue": 20, "max_concurrent": 1}
        running = lane.enter(asked("small", **more))
        waiting = [lane.enter(asked("flood", **more)) for _ in range(10)]
        begun = []
        for _ in range(6):
            served(lane, running)
            lane.enter(asked("small", **more))
            [running] = lane.running
            begun.append(running.tenant)
        assert begun.count("small") == begun.count("flood") == 3
        assert said(waiting[2]) == "admitted"

    run(scenario)


def test_a_tenant_alone_leaves_no_slot_empty() -> None:
    async def scenario(lane: Lane) -> None:
        for _ in range(4):
            lane.enter(asked())
        for _ in range(6):
            served(lane, next(iter(lane.running)))
            assert len(lane.running) == 2
            lane.enter(asked())

    run(scenario)


class Here:
    """An admission in this process, called as Ray's actors are."""

    def __init__(self, actor: Admission) -> None:
        self.actor = actor
        self.calls: Counter[str] = Counter()

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> asyncio.Future[Any]:
            self.calls[method] += 1
            return asyncio.ensure_future(getattr(self.actor, method)(*arguments))

        return SimpleNamespace(remote=remote)


def test_a_flood_is_refused_where_it_comes_in_and_no_other_tenant_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(actor: Admission) -> None:
        here = Here(actor)
        monkeypatch.setattr(client, "admission", lambda: here)
        monkeypatch.setattr(client, "BEAT_S", admission.BEAT_S)
        lanes = client.Lanes("ingress", {"search": (1, 4)}, {})
        lanes.start([])

        async def ask(tenant: str) -> DureError | None:
            try:
                async with lanes.admitted("search", dataclasses.replace(Caller.waiting(20), tenant=tenant)):
                    await asyncio.sleep(20)
            except DureError as error:
                return error
            return None

        async def until(condition: Callable[[], bool]) -> None:
            for _ in range(500):
                if condition():
                    return
                await asyncio.sleep(0.01)
            pytest.fail("in 5 s it was not so")

        lane = actor._lane("search")
        flood = [asyncio.ensure_future(ask("flood"))]
        await until(lambda: len(lane.running) == 1)
        flood += [asyncio.ensure_future(ask("flood")) for _ in range(4)]
        await until(lambda: len(lane.queue) == 4)
        lane.tickets.pace.seconds_per_turn = 8.0  # so that there are few tickets
        refusals: list[DureError] = []
        for _ in range(100):
            if error := await ask("flood"):
                refusals.append(error)
            if len([each for each in refusals if not each.ticket]) == 3:
                await asyncio.sleep(2 * admission.BEAT_S)  # what admission has heard of meanwhile still counts
        assert [error.status for error in refusals] == [429] * 100
        tickets = [bool(error.ticket) for error in refusals]
        assert tickets == sorted(tickets, reverse=True)
        assert 0 < sum(tickets) < 10
        times = [error.retry_after_s for error in refusals if not error.ticket]
        assert times[0] in (70, 71)  # rounded up, and time passes
        assert times[:4] == [times[0] + more for more in (0, 10, 20, 30)]
        assert max(filter(None, times)) == LONGEST_S
        assert here.calls["enter"] < 5 + 20
        small = asyncio.ensure_future(ask("small"))
        await until(lambda: len(lane.queue.of("small")) == 1)
        await until(lambda: lane.rejected == 101)  # one of the flood has made room for the small tenant
        for task in (small, *flood):
            task.cancel()
        await asyncio.gather(small, *flood, return_exceptions=True)

    admitting(scenario, monkeypatch)


def test_an_admission_that_dies_again_is_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "AWAY_S", 0.3)
    monkeypatch.setattr(client, "RETRY_PAUSE_S", 0.02)

    class Dying(Here):
        """Dies at once, then after it has been there for longer than one may be away, then no more."""

        def __getattr__(self, method: str) -> Any:
            whole = super().__getattr__(method)
            if method != "enter" or self.calls["enter"] >= 2:
                return whole
            self.calls["enter"] += 1

            async def dies(seconds: float) -> None:
                await asyncio.sleep(seconds)
                raise RayActorError

            return SimpleNamespace(remote=lambda _: dies(0.5 * (self.calls["enter"] - 1)))

    async def scenario(actor: Admission) -> None:
        here = Dying(actor)
        monkeypatch.setattr(client, "admission", lambda: here)
        async with client.Lanes("ingress", {"search": (1, 4)}, {}).admitted("search", Caller.waiting(20)):
            assert here.calls["enter"] == 3

    admitting(scenario, monkeypatch)
