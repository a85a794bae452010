"""The order in which tenants and their requests have their turns."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from serve.queues.fair_queue import FairQueue


@dataclass(eq=False)
class Entry:
    tenant: str
    size: int = 1
    weight: float = 1.0


def served(queue: FairQueue[Entry], turns: int) -> Iterator[Entry]:
    """Whoever has each of the next turns."""
    for _ in range(turns):
        yield queue.take(1)[0]


@pytest.mark.parametrize("credit", [1, 8, 32])
@pytest.mark.parametrize(("weight", "share"), [(1.0, 1 / 8), (4.0, 4 / 11)])
def test_new_names_get_no_more_than_their_share_beside_a_tenant_that_always_asks(
    credit: int, weight: float, share: float
) -> None:
    queue: FairQueue[Entry] = FairQueue(credit)
    names = itertools.count()
    for _ in range(7):
        queue.put(Entry(f"new {next(names)}"))
    queue.put(Entry("known", weight=weight))
    count: Counter[str] = Counter()
    for _ in range(4000):
        [entry] = served(queue, 1)
        known = entry.tenant == "known"
        count["known"] += known
        queue.put(Entry("known", weight=weight) if known else Entry(f"new {next(names)}"))
    assert count["known"] / 4000 == pytest.approx(share, rel=0.05)


def test_short_requests_of_its_own_tenant_do_not_keep_a_long_one_waiting() -> None:
    queue: FairQueue[Entry] = FairQueue(8)
    for tenant in "bcde":
        queue.put(Entry(tenant))
    long = Entry("a", size=100)
    queue.put(long)
    for turn in range(1000):
        if turn % 50 == 0:
            queue.put(Entry("a"))
        [entry] = served(queue, 1)
        if entry.tenant != "a":
            queue.put(Entry(entry.tenant))
        if long not in queue.of("a"):
            break
    assert turn < 600, "even turns give it a fifth of them"


def test_who_weighs_more_has_more_at_once() -> None:
    queue: FairQueue[Entry] = FairQueue(8)
    for tenant, weight in [("tin", 0.25), *((f"t{number}", 1.0) for number in range(8)), ("gold", 4.0)]:
        queue.put(Entry(tenant, weight=weight))
    order = [entry.tenant for entry in served(queue, 10)]
    assert (order[0], order[-1]) == ("gold", "tin")


def test_who_asks_little_goes_before_a_flood_that_had_all_turns() -> None:
    queue: FairQueue[Entry] = FairQueue(32)
    for _ in range(10):
        queue.put(Entry("flood", size=25))
    for _ in range(3):
        queue.take(25)
    for _ in range(3):
        queue.put(Entry("small", size=25))
        assert [queue.take(25)[0].tenant for _ in range(2)] == ["small", "flood"]


def test_what_a_tenant_had_before_is_held_against_it_for_a_while_only() -> None:
    queue: FairQueue[Entry] = FairQueue(2)
    others = [Entry(tenant, size=100) for tenant in "bcd"]
    queue.put(Entry("a", size=100))
    for other in others:
        queue.put(other)
    queue.take(100)
    for other in others:
        queue.remove(other)
    for _ in range(20):
        queue.put(Entry("e"))
    queue.put(Entry("a"))
    assert "a" in [entry.tenant for entry in served(queue, 6)]


@pytest.mark.parametrize(("clients", "size"), [(2, 32), (4, 16), (64, 1)])
def test_a_tenant_that_is_back_before_the_next_call_does_not_hold_up_a_long_list(clients: int, size: int) -> None:
    queue: FairQueue[Entry] = FairQueue(32)
    long = Entry("a", size=1900)
    queue.put(long)
    back = [Entry("b", size=size) for _ in range(clients)]
    calls = 0
    while long in queue.of("a") or not calls:
        for entry in back:
            queue.put(Entry(entry.tenant, size=entry.size))
        back, room = [], 32
        while room and queue:
            entry, turns = queue.take(room)
            room -= turns
            if entry.tenant == "b" and entry not in queue.of("b"):
                back.append(entry)
        calls += 1
    assert calls == pytest.approx(2 * 1900 / 32, rel=0.05), "even turns"


@pytest.mark.parametrize("credit", [0, 1, 32])
def test_it_tells_the_order_in_which_it_serves(credit: int) -> None:
    draw = random.Random(credit)
    queue: FairQueue[Entry] = FairQueue(credit)
    for _ in range(100):
        for _ in range(draw.randint(1, 10)):
            tenant = draw.choice("abcdef")
            queue.put(Entry(tenant, draw.choice([1, 1, 1, 5, 30]), {"a": 4.0, "b": 0.5}.get(tenant, 1.0)))
        for _ in range(draw.randint(0, 12)):
            if queue:
                queue.take(draw.randint(1, 8))
    told = list(queue)
    order = []
    while queue:
        entry, _ = queue.take(1000)
        order.append(entry)
    assert told == order
