"""What waits in one process for a deployment: bounded, and how fast it goes."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from serve import errors
from serve.caller import DEFAULT_TENANT, Caller
from serve.lanes.tickets import Tickets
from serve.metrics import QUEUE_ITEMS, REJECTED


@dataclass(frozen=True)
class GateStanding:
    """How a gate is."""

    name: str
    items: int
    """Waiting or running."""
    running: int
    max_items: int
    rejected: int
    tickets: int
    service_time_p50_s: float | None
    seconds_per_item: float


class Gate:
    """Counts items, lets in while there is room, and tells those it refuses when to come back."""

    def __init__(self, name: str, max_items: int) -> None:
        self.name = name
        self.max_items = max_items
        self.items = 0
        self.running: Callable[[], int] = lambda: 0
        """How many of the items have left for a replica."""
        self.overload: Callable[[], str] = lambda: ""
        """Why no new work is taken; empty where it is."""
        self.rejected = 0
        self.tickets = Tickets(name, secrets.token_bytes(32))
        """Those of other processes are good here once they share a key."""
        self._freed = asyncio.Event()
        self._gauge = QUEUE_ITEMS.labels(name)

    @asynccontextmanager
    async def admitted(self, items: int, patience_s: float = 0, caller: Caller | None = None) -> AsyncIterator[None]:
        """Raises a 429 where the queue is full and stays so for `patience_s`, and a 503 where there is overload.

        A list gets in whole while there is room for one item, so that long lists don't starve behind short ones. Those
        who are told to come back have room held for them.
        """
        self.check()
        tenant, ticket = (caller.tenant, caller.ticket) if caller else (DEFAULT_TENANT, None)
        most = self.max_items
        if not patience_s and not self.tickets.redeem(ticket, tenant):
            most -= self.tickets.held(self.items, self.max_items)
        deadline = time.monotonic() + patience_s
        while self.items >= most:
            left = deadline - time.monotonic()
            if left <= 0 and patience_s:
                raise errors.too_late(self.name, patience_s)
            if left <= 0:
                self.rejected += 1
                REJECTED.labels(self.name).inc()
                refused = self.tickets.refuse(tenant, self.items, self.max_items, items, ticket)
                raise errors.queue_full(self.name, refused)
            # Not wait_for, which in Python 3.11 forgets that it was cancelled where it has just been freed.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._freed.wait()
        self.items += items
        self._gauge.set(self.items)
        try:
            yield
        finally:
            self.items -= items
            self._gauge.set(self.items)
            self._freed.set()
            self._freed = asyncio.Event()

    def check(self) -> None:
        """Raises a 503 where no new work is taken."""
        if reason := self.overload():
            raise errors.no_capacity(self.name, reason)

    def served(self, items: int, started: float) -> None:
        """A call that `started` then (time.monotonic) has been answered."""
        self.tickets.pace.served(items, started)

    def standing(self) -> GateStanding:
        pace = self.tickets.pace
        return GateStanding(
            self.name,
            self.items,
            min(self.items, self.running()),
            self.max_items,
            self.rejected,
            self.tickets.outstanding,
            pace.p50_s,
            pace.seconds_per_item,
        )
