"""Bounds what waits for a deployment in one process, shares the room among tenants, and measures the pace."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from serve import errors
from serve.caller import DEFAULT_TENANT, Caller
from serve.errors import DureError
from serve.metrics import QUEUE_ITEMS, REJECTED
from serve.queues.tickets import FOR_NEWCOMERS, Refused, Tickets
from serve.waiting import within


@dataclass(frozen=True)
class GateStanding:
    """State of a gate."""

    name: str
    turns: int
    """Waiting or running."""
    running: int
    """Those of them that have been sent to a replica."""
    max_turns: int
    rejected: int
    tickets: int
    service_time_p50_s: float | None
    seconds_per_turn: float


MOST = 2
"""Hard limit of the queue as a multiple of `max_turns`, for tenants below their fair share of a queue that others have
filled. Names are cheap, and a client that invents many must not make the queue long."""


USUAL = 0.05
"""Weight of the newest request in `usual_turns`."""


class Gate:
    """Counts turns, admits requests while there is room, and tells those it refuses when to come back.

    A short item takes one turn, a longer one more, and a call of a service one.
    """

    def __init__(self, name: str, max_turns: int, weights: Mapping[str, float] | None = None) -> None:
        """A tenant's weight is 1 if `weights` has none."""
        self.name = name
        self.max_turns = max_turns
        self.weights = weights or {}
        self.items = 0
        self.turns = 0
        self.turns_of: Counter[str] = Counter()
        """By tenant."""
        self.running: Callable[[], int] = lambda: 0
        """How many of the turns have been sent to a replica."""
        self.overload: Callable[[], str] = lambda: ""
        """Why no new work is accepted; empty if it is."""
        self.rejected = 0
        self.tickets = Tickets(name, secrets.token_bytes(32))
        """Tickets of other processes are honoured once all share a key."""
        self.usual_turns = 1.0
        """Turns of an average request."""
        self._full: dict[str, tuple[Refused, float]] = {}
        """By tenant: its last refusal without a ticket, and until when that stands (time.monotonic)."""
        self._freed = asyncio.Event()
        self._gauge = QUEUE_ITEMS.labels(name)

    @asynccontextmanager
    async def admitted(
        self, turns: int, patience_s: float = 0, caller: Caller | None = None, items: int = 1
    ) -> AsyncIterator[None]:
        """Occupy the queue while the body runs.

        Raises a 429 if the queue is full, a 504 instead if it stays full for `patience_s`, and a 503 under overload.
        A list is admitted whole while there is room for one turn, so that long lists don't starve behind short ones.
        Room is held for clients that were told to come back. A tenant can always use its fair share of the queue.
        """
        self.check()
        tenant, ticket = (caller.tenant, caller.ticket) if caller else (DEFAULT_TENANT, None)
        self.usual_turns += USUAL * (turns - self.usual_turns)
        awaited = bool(patience_s) or self.tickets.redeem(ticket, tenant)
        deadline = time.monotonic() + patience_s
        while not self._has_room(tenant, awaited):
            left = deadline - time.monotonic()
            if left <= 0 and patience_s:
                raise errors.too_late(self.name, patience_s)
            if left <= 0:
                raise self._refused(turns, tenant, ticket)
            await within(self._freed, left)
        self._count(tenant, turns, items)
        try:
            yield
        finally:
            self._count(tenant, -turns, -items)
            self._freed.set()
            self._freed = asyncio.Event()

    def check_newcomer(self, caller: Caller) -> None:
        """Raises what `admitted` would raise now for a request of unknown size, which is taken to be average."""
        self.check()
        if self.turns < max(1, int(FOR_NEWCOMERS * self.max_turns)):  # this part is never held for tickets
            return
        if self.full(caller):
            raise self.turned_away(caller)
        if not caller.ticket and not self._has_room(caller.tenant, awaited=False):
            raise self._refused(max(1, round(self.usual_turns)), caller.tenant, None)

    def full(self, caller: Caller) -> bool:
        """Whether a refusal without a ticket still stands for newcomers of the caller's tenant."""
        _, until = self._full.get(caller.tenant, (None, 0.0))
        return not caller.ticket and time.monotonic() < until

    def turned_away(self, caller: Caller) -> DureError:
        """The refusal of one more newcomer while the queue is `full`, to come back after those before it."""
        refused, _ = self._full[caller.tenant]
        due = self.tickets.put_off(caller.tenant, refused.each_s)
        return self._rejected(replace(refused, retry_after_s=math.ceil(round(due - self.tickets.clock(), 3))))

    def _refused(self, turns: int, tenant: str, ticket: str | None) -> DureError:
        expected = self.tickets.coming(self.max_turns, tenant).tenants
        mine, share = self.turns_of[tenant], self._share(tenant, expected)
        refused = self.tickets.refuse(tenant, self.turns, self.max_turns, turns, ticket, mine, share)
        now = time.monotonic()
        self._full = {name: full for name, full in self._full.items() if full[1] > now}
        if refused.stands_s:
            self._full[tenant] = refused, now + refused.stands_s
        return self._rejected(refused)

    def _rejected(self, refused: Refused) -> DureError:
        self.rejected += 1
        REJECTED.labels(self.name).inc()
        return refused.error(self.name)

    def _has_room(self, tenant: str, awaited: bool) -> bool:
        """`awaited`: room held for clients that were told to come back is held for this one."""
        if awaited:
            share, held, own_held = self._share(tenant), 0, 0
        else:
            coming = self.tickets.coming(self.max_turns, tenant)
            share, held, own_held = self._share(tenant, coming.tenants), coming.held, coming.own
        if self.turns < self.max_turns - held:
            return True
        if sum(min(turns, self.max_turns) for turns in self.turns_of.values()) >= MOST * self.max_turns:
            return False
        return self.turns_of[tenant] + own_held < self.max_turns * share

    def _share(self, tenant: str, expected: Collection[str] = ()) -> float:
        """The tenant's fair share of the queue, 0 to 1, among tenants that have turns in it and those `expected`."""
        weights = {name: self.weights.get(name, 1.0) for name in (*self.turns_of, *expected, tenant)}
        return weights[tenant] / sum(weights.values())

    def _count(self, tenant: str, turns: int, items: int) -> None:
        self.items += items
        self.turns += turns
        self.turns_of[tenant] += turns
        if not self.turns_of[tenant]:
            del self.turns_of[tenant]
        self._gauge.set(self.items)

    def check(self) -> None:
        """Raises a 503 while no new work is accepted."""
        if reason := self.overload():
            raise errors.overloaded(self.name, reason)

    def served(self, turns: int, started: float) -> None:
        """Record that a call begun at `started` (time.monotonic) has been answered."""
        self.tickets.pace.served(turns, started)

    def standing(self) -> GateStanding:
        pace = self.tickets.pace
        return GateStanding(
            self.name,
            self.turns,
            min(self.turns, self.running()),
            self.max_turns,
            self.rejected,
            self.tickets.outstanding,
            pace.p50_s,
            pace.seconds_per_turn,
        )
