"""What waits in this process for a model: many requests of many clients, which leave as few large calls."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from deployments.answers import Answers, Collector
from deployments.pace import BatchCost, Linger


@dataclass(eq=False)
class Parcel:
    """The items of one request, which may travel in several calls."""

    items: list[Any]
    deadline: float
    """On the clock of time.monotonic."""
    collector: Collector
    done: asyncio.Future[None]
    """Fails with the call that failed; cancelled where the client has gone."""
    sent: int = 0


@dataclass(eq=False)
class Call:
    """Parts of parcels on their way to a replica and back: each with its first place there, its end, and its rows."""

    parts: list[tuple[Parcel, range]] = field(default_factory=list)
    size: int = 0
    task: asyncio.Task[None] | None = None


Send = Callable[[list[Any], list[float], int], Awaitable[Answers]]
"""Calls a replica with items, the seconds left for each, and how many more wait here."""


class Coalescer:
    """Sends what waits for a model as one call, and no more calls than keep its replicas busy.

    A hop between processes costs about a millisecond of CPU, a request in it next to nothing. So each replica has one
    call to work on, and a second one to prepare meanwhile once that would be as large as those under way. What comes
    later waits here, where its client can still take it back for nothing.

    Room in a call is dealt out evenly among the requests that wait, so that a long list does not hold up short ones.
    """

    def __init__(self, send: Send, max_call_items: int, replicas: Callable[[], int]) -> None:
        self.send = send
        self.max_call_items = max_call_items
        self.replicas = replicas
        self.waiting = 0
        """Items that have not been sent."""
        self.cost = BatchCost()
        self.linger = Linger(self.cost)
        self._parcels: deque[Parcel] = deque()
        self._calls: set[Call] = set()
        self._wake = asyncio.Event()
        self._pumping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send; needs a running event loop."""
        self._pumping = asyncio.get_running_loop().create_task(self._pump())

    async def ask(self, items: list[Any], timeout_s: float) -> Answers:
        """The items' answers. Raises TimeoutError, or what `send` raised for one of the calls they were in."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        parcel = Parcel(items, time.monotonic() + timeout_s, Collector(len(items)), done)
        self._parcels.append(parcel)
        self.waiting += len(items)
        self.linger.arrived(len(items))
        if self._pause_s() is not None:
            self._wake.set()
        try:
            await asyncio.wait_for(done, timeout_s)
            return parcel.collector.answers()
        finally:
            self._forget(parcel)

    def _forget(self, parcel: Parcel) -> None:
        """Drop what of the parcel has not been sent, and the calls that nobody waits for any more."""
        left = len(parcel.items) - parcel.sent
        if left:
            self._parcels.remove(parcel)
            self.waiting -= left
        if parcel.collector.left:
            parcel.done.cancel()
            for call in self._calls:
                if call.task and all(each.done.done() for each, _ in call.parts):
                    call.task.cancel()

    def _pause_s(self) -> float | None:
        """How long to wait before the next call; None: until something else happens."""
        if not self.waiting:
            return None
        replicas = max(1, self.replicas())
        if len(self._calls) < replicas:
            return self.linger.wait_s(self.waiting, self.waiting, self.max_call_items)
        if len(self._calls) < 2 * replicas:
            smallest = min(call.size for call in self._calls)
            if self.waiting >= min(smallest, self.max_call_items):
                return 0.0
        return None

    async def _pump(self) -> None:
        while True:
            pause_s = self._pause_s()
            if pause_s is not None and pause_s <= 0:
                call = self._take()
                self._calls.add(call)
                call.task = asyncio.get_running_loop().create_task(self._run(call))
                continue
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause_s)

    def _take(self) -> Call:
        call = Call()
        while call.size < self.max_call_items and self._parcels:
            parcel = self._parcels.popleft()
            room = max(1, (self.max_call_items - call.size) // (len(self._parcels) + 1))
            places = range(parcel.sent, min(parcel.sent + room, len(parcel.items)))
            call.parts.append((parcel, places))
            call.size += len(places)
            parcel.sent = places.stop
            if parcel.sent < len(parcel.items):
                self._parcels.append(parcel)
        self.waiting -= call.size
        return call

    async def _run(self, call: Call) -> None:
        started = time.monotonic()
        items: list[Any] = []
        timeouts_s: list[float] = []
        for parcel, places in call.parts:
            items += parcel.items[places.start : places.stop]
            timeouts_s += [max(0.0, parcel.deadline - started)] * len(places)
        try:
            self._deliver(call, await self.send(items, timeouts_s, self.waiting))
        except Exception as error:
            for parcel, _ in call.parts:
                if not parcel.done.done():
                    parcel.done.set_exception(error)
        finally:
            seconds = time.monotonic() - started
            self._calls.discard(call)
            self.cost.observe(call.size, seconds)
            self.linger.ended(call.size, seconds)
            self._wake.set()

    def _deliver(self, call: Call, answers: Answers) -> None:
        start = 0
        for parcel, places in call.parts:
            rows = range(start, start + len(places))
            start = rows.stop
            collector = parcel.collector
            if answers.refusals:
                refused = {row: answers.refusals[row] for row in rows if row in answers.refusals}
                for row, refusal in refused.items():
                    collector.refuse(places[row - rows.start], refusal)
                rows_left = [row for row in rows if row not in refused]
                collector.put([places[row - rows.start] for row in rows_left], answers.results, rows_left)
            else:
                collector.put(places, answers.results, rows)
            if collector.left == 0 and not parcel.done.done():
                parcel.done.set_result(None)
