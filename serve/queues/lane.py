"""One service's queue for the whole cluster: bounds what runs and what waits, and tells the rest when to come back."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from serve.queues.fair_queue import FairQueue
from serve.queues.kept_slots import KeptSlots
from serve.queues.pace import Pace
from serve.queues.tickets import Refused, Tickets


@dataclass(frozen=True)
class Asked:
    """A request that asks for a slot, as its ingress describes it."""

    id: str
    lane: str
    tenant: str
    holder: str
    """The process that waits for the slot and then runs the request."""
    timeout_s: float
    max_concurrent: int
    max_queue: int
    weight: float = 1.0
    ticket: str | None = None


Decision = Refused | Literal["admitted", "late", "gone"]


@dataclass(eq=False)
class Entry:
    """A request that waits or runs."""

    asked: Asked
    has_ticket: bool
    deadline: float
    """On the clock of time.monotonic."""
    decision: asyncio.Future[Decision]
    came_back: bool = False
    """At once after another request of its tenant's."""
    admitted_at: float | None = None
    seen_at: float = field(default_factory=time.monotonic)
    """When its holder last reported it."""

    @property
    def tenant(self) -> str:
        return self.asked.tenant

    @property
    def weight(self) -> float:
        return self.asked.weight

    @property
    def size(self) -> int:
        return 1

    def decide(self, decision: Decision) -> None:
        if not self.decision.done():
            self.decision.set_result(decision)


@dataclass(frozen=True)
class Standing:
    """State of a lane."""

    running: int
    waiting: int
    rejected: int
    max_concurrent: int
    max_queue: int
    tickets: int
    """Outstanding."""
    service_time_p50_s: float | None
    estimated_wait_s: float
    """For a request that arrives now."""
    waiting_by_tenant: dict[str, int]

    @classmethod
    def idle(cls, max_concurrent: int, max_queue: int) -> Standing:
        """State of a lane that has had no requests yet."""
        return cls(0, 0, 0, max_concurrent, max_queue, 0, None, 0.0, {})


class Lane:
    """Grants slots to tenants in turn; needs a running event loop."""

    def __init__(self, name: str, key: bytes) -> None:
        self.tickets = Tickets(f"lane {name}", key)  # a service's own gate has the bare name
        self.max_concurrent = self.max_queue = 0
        self.running: set[Entry] = set()
        self.queue: FairQueue[Entry] = FairQueue(credit=1)
        self.kept_slots = KeptSlots()
        self.rejected = 0
        self.paused = False
        """Nothing begins until it is known what is running already."""

    def enter(self, asked: Asked) -> Entry:
        """Admit, queue or refuse a request; the entry's `decision` holds the outcome."""
        self.max_concurrent, self.max_queue = asked.max_concurrent, asked.max_queue
        gap = self.kept_slots.came(asked.tenant)
        entry = Entry(
            asked,
            self.tickets.redeem(asked.ticket, asked.tenant),
            time.monotonic() + asked.timeout_s,
            asyncio.get_running_loop().create_future(),
            came_back=gap is not None,
        )
        if gap and gap.keeps_slot and len(self.running) < self.max_concurrent and not self.paused:
            self._admit(entry)
            return entry
        if not self._has_room(entry):
            self._refuse(entry)
            return entry
        self.queue.put(entry)
        self.fill()
        if self._waiting > self.max_queue:  # it used its tenant's share: a tenant over its own loses one
            last = self.queue.last(self._excess, lambda entry: not entry.has_ticket)
            self.queue.remove(last)
            self._refuse(last)
        return entry

    def leave(self, entry: Entry) -> None:
        """The request has ended, or nobody waits for it any more."""
        if entry in self.running:
            self.running.remove(entry)
            assert entry.admitted_at is not None
            self.tickets.pace.served(1, entry.admitted_at)
            self._expect_back(entry)
        elif not entry.decision.done():
            self.queue.remove(entry)
            entry.decide("gone")
        self.fill()

    def turned_away(self, tenant: str, count: int, seconds: float) -> None:
        """An ingress refused `count` newcomers of the tenant's by itself; they will take `seconds` to serve."""
        self.rejected += count
        self.tickets.put_off(tenant, seconds)

    def resume(self, asked: Asked) -> Entry:
        """The request is running already, admitted by an actor that has died since."""
        self.max_concurrent, self.max_queue = asked.max_concurrent, asked.max_queue
        decision: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        entry = Entry(asked, False, 0, decision, admitted_at=time.monotonic())
        entry.decide("admitted")
        self.running.add(entry)
        return entry

    def fill(self) -> None:
        """Admit entries while slots are free. Those past their deadline are turned away."""
        now = time.monotonic()
        free = self.max_concurrent - len(self.running) - len(self.kept_slots.kept)
        while self.queue and free > 0 and not self.paused:
            entry, _ = self.queue.take()
            if entry.deadline <= now:
                entry.decide("late")
                continue
            self._admit(entry)
            free -= 1

    def expire(self) -> None:
        """Turn away entries whose deadline has passed while they waited."""
        now = time.monotonic()
        for entry in [entry for entry in self.queue if entry.deadline <= now]:
            self.queue.remove(entry)
            entry.decide("late")

    def places(self) -> dict[str, tuple[int, float]]:
        """Place, from 1, and estimated wait in seconds of each waiting request, by id."""
        pace_s = self._pace().seconds_per_turn
        return {entry.asked.id: (place, place * pace_s) for place, entry in enumerate(self.queue, 1)}

    def standing(self) -> Standing:
        waiting, pace = self._waiting, self._pace()
        busy = len(self.running) + len(self.kept_slots.kept) >= self.max_concurrent
        return Standing(
            len(self.running),
            waiting,
            self.rejected,
            self.max_concurrent,
            self.max_queue,
            self.tickets.outstanding,
            pace.p50_s,
            (waiting + 1) * pace.seconds_per_turn if busy else 0.0,
            dict(Counter(entry.tenant for entry in self.queue)),
        )

    @property
    def _waiting(self) -> int:
        return len(self.queue)

    def _admit(self, entry: Entry) -> None:
        entry.admitted_at = time.monotonic()
        self.running.add(entry)
        entry.decide("admitted")

    def _has_room(self, entry: Entry) -> bool:
        """A tenant can always use its fair share of the queue, however much others have waiting or reserved."""
        if not self._waiting and len(self.running) < self.max_concurrent:
            return True
        tenant, weight = entry.tenant, entry.weight
        if entry.has_ticket:
            due, held, own_held = self._due_to(tenant, weight), 0, 0
        else:
            coming = self.tickets.coming(self.max_queue, tenant)
            due, held, own_held = self._due_to(tenant, weight, coming.tenants), coming.held, coming.own
        return self._waiting < self.max_queue - held or len(self.queue.of(tenant)) + own_held + 1 <= due

    def _due_to(self, tenant: str, weight: float, expected: Collection[str] = ()) -> float:
        """Places in the queue that are a tenant's fair share, among tenants that wait and those `expected`."""
        return self.max_queue * self.queue.share(tenant, weight, expected)

    def _excess(self, tenant: str) -> float:
        """Places that a tenant holds beyond its fair share."""
        return len(self.queue.of(tenant)) - self._due_to(tenant, self.queue.lines[tenant].weight)

    def _expect_back(self, entry: Entry) -> None:
        """Keep the slot for a tenant that comes back at once and is within its share of slots, while others wait."""
        tenant, kept = entry.tenant, self.kept_slots.kept
        own = [name for name in (*(each.tenant for each in self.running), *kept) if name == tenant]
        others = {each.tenant for each in self.running} | set(kept)
        share = self.max_concurrent * self.queue.share(tenant, entry.weight, others)
        others_wait = bool(self.queue) and not self.queue.of(tenant)
        keep = entry.came_back and others_wait and len(own) + 1 <= share
        soon_s = self.kept_slots.expect(tenant, self.tickets.pace.p50_s or 0.0, keep)
        if keep:
            asyncio.get_running_loop().call_later(soon_s, self.fill)

    def _pace(self) -> Pace:
        """The pace, with what still runs taken into account."""
        if self.running:
            oldest = min(entry.admitted_at or entry.seen_at for entry in self.running)
            self.tickets.pace.unserved(len(self.running), oldest)
        return self.tickets.pace

    def _refuse(self, entry: Entry) -> None:
        self.rejected += 1
        self._pace()
        asked = entry.asked
        share = self.queue.share(asked.tenant, asked.weight, self.tickets.coming(self.max_queue, asked.tenant).tenants)
        held = len(self.queue.of(asked.tenant))
        entry.decide(self.tickets.refuse(asked.tenant, self._waiting, self.max_queue, 1, asked.ticket, held, share))
