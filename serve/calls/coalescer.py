"""What waits in this process for a model: many requests of many clients, which leave as few large calls."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from deployments.batching.batch_cost import BatchCost, Linger
from deployments.collector import Collector, Shares
from deployments.messages import Answers, News, Piece, Requests
from serve.caller import DEFAULT_TENANT
from serve.calls.pending import Call, Parcel
from serve.progress import Following
from serve.queues.fair_queue import FairQueue
from serve.queues.pace import Pace

LEAD, LEAD_S = 0.1, 0.01
"""How long before the end of the call under way the next one leaves: a part of its time, as that is only expected, and
as many seconds as a call may need to be sent and prepared."""
SPLIT = 0.05
"""What not to split a request may cost: a part of the time per item."""


Send = Callable[[Requests, Callable[[Piece], None]], Awaitable[None]]
"""Calls a replica and hands on answers as they come."""
GATHER_S = 0.005
"""Between two calls to an engine that works in steps: a fraction of a step, and at most 200 calls a second."""


class Coalescer:
    """Sends what waits for a model as one call, and no more calls than keep its replicas busy.

    A hop between processes costs about a millisecond of CPU, a request in it next to nothing. So each replica has one
    call to work on, and a second one to prepare once that is full, or as large as the first where two such calls in
    turn are faster than one for which all clients have to be back. A lone replica is given that no sooner than it needs
    it. What comes later waits here, where its client can still take it back for nothing. Answers come back batch by
    batch, so that nobody waits for the slowest in a call.

    Where the engine works in steps, and takes newcomers at each, a call leaves at once, as long as there is room for it
    in what the replicas may have on their way.

    Calls are filled first with who would be done first if tenants took turns, and a tenant's requests theirs, so that
    neither a flood nor a long list holds up others. What an item takes is counted in turns, more of them for more text.
    """

    def __init__(
        self,
        send: Send,
        max_call_turns: Callable[[], int],
        replicas: Callable[[], int],
        in_steps: Callable[[], bool] = lambda: False,
        pace: Pace | None = None,
    ) -> None:
        """`pace`: how fast turns pass, for those who ask how long they will wait."""
        self.send = send
        self.max_call_turns = max_call_turns
        self.replicas = replicas
        self.in_steps = in_steps
        self.pace = pace or Pace()
        self.name = secrets.token_hex(8)
        """By which replicas tell callers apart."""
        self.waiting = 0
        """Turns that are still to be had."""
        self.cost = BatchCost()
        self.linger = Linger(self.cost)
        self._parcels: FairQueue[Parcel] = FairQueue(credit=max_call_turns())
        self._calls: list[Call] = []
        """In the order in which they left."""
        self._numbers = itertools.count(secrets.randbits(62))  # no other caller's
        self._left_at = 0.0
        """When the last one did."""
        self._followed = 0
        """How many of the requests that are here somebody follows."""
        self._wake = asyncio.Event()
        self._pumping: asyncio.Task[None] | None = None

    @property
    def under_way(self) -> int:
        """Turns of the items that have been sent and not answered."""
        return sum(call.left for call in self._calls)

    @property
    def alive(self) -> bool:
        """Is what waits here ever sent?"""
        return self._pumping is not None and not self._pumping.done()

    def start(self) -> None:
        """Begin to send; needs a running event loop."""
        self._pumping = asyncio.get_running_loop().create_task(self._pump())

    async def ask(
        self,
        items: list[Any],
        timeout_s: float,
        following: Following | None = None,
        tenant: str = DEFAULT_TENANT,
        weight: float = 1.0,
        turns: list[int] | None = None,
    ) -> Answers:
        """The items' answers. Raises TimeoutError, or what `send` raised for one of the calls they were in.

        `turns` that each item takes: one, where they are left out.
        """
        turns = turns or [1] * len(items)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        collector = Collector(len(items))
        parcel = Parcel(items, time.monotonic() + timeout_s, collector, done, following, tenant, weight, turns)
        self._parcels.credit = self.max_call_turns()
        self._parcels.put(parcel)
        self.waiting += parcel.size
        self._followed += following is not None
        self._tell_places()
        self.linger.arrived(parcel.size)
        if self._pause_s() is not None:
            self._wake.set()
        try:
            await asyncio.wait_for(done, timeout_s)
            return parcel.collector.answers()
        finally:
            self._followed -= following is not None
            self._forget(parcel)

    def _forget(self, parcel: Parcel) -> None:
        """Drop what of the parcel has not been sent, and the calls that nobody waits for any more."""
        left = parcel.size - parcel.had
        if left:
            self._parcels.remove(parcel)
            self.waiting -= left
        if parcel.collector.left:
            parcel.done.cancel()
            for call in self._calls:
                if call.task and all(each.done.done() for each, _ in call.owners):
                    call.task.cancel()

    def _pause_s(self) -> float | None:
        """How long to wait before the next call; None: until something else happens."""
        if not self.waiting:
            return None
        replicas = max(1, self.replicas())
        if self.in_steps():
            if not self._calls:
                return 0.0
            return max(0.0, self._left_at + GATHER_S - time.monotonic()) if self._room() > 0 else None
        if len(self._calls) < replicas:
            return self.linger.wait_s(self.waiting, self.waiting, self.max_call_turns())
        if len(self._calls) < 2 * replicas:
            if self.waiting >= self.max_call_turns():
                return self._until_needed_s()
            under_way = min(call.left for call in self._calls)
            if self.waiting >= under_way and self._is_faster_apart(under_way):
                return self._until_needed_s()
        return None

    def _until_needed_s(self) -> float:
        """How long a replica will do without another call: what comes till then may have its turn before others.

        Of several replicas Serve chooses one with the fewest calls. They have to have one each to prepare at once, or
        the next might go to one that has just begun, and another would stand still.
        """
        [call, *others] = self._calls
        if others or call.since is None:
            return 0.0
        return call.since + (1 - LEAD) * self.cost.seconds(call.left) - LEAD_S - time.monotonic()

    def _room(self) -> int:
        """For how many turns the next call has room."""
        most = self.max_call_turns()
        return min(most, most * max(1, self.replicas()) - self.under_way) if self.in_steps() else most

    def _is_faster_apart(self, under_way: int) -> bool:
        """Are two calls, one right after the other, faster than one for which all clients have to be back?"""
        turns = under_way + self.waiting
        together = min(turns, self.max_call_turns())
        apart_s = self.cost.seconds(turns) + self.cost.fixed
        return turns * (self.cost.seconds(together) + self.linger.back_s) >= together * apart_s

    def _better_cut(self, turns: int, room: int) -> bool:
        """Is a call of so many nearly as fast for each as a full one, which would have a part of the next request?

        That part would make the others wait, and be no sooner for its request, as the rest comes with the next call.
        """
        splits = room - turns < self._parcels.next_turns <= self.max_call_turns()
        if not turns or not splits or self.in_steps():
            return False
        return self.cost.seconds(turns) * room < (1 + SPLIT) * self.cost.seconds(room) * turns

    def _begin(self) -> None:
        """Those that come first are what the replicas work on; where there are none yet, nothing is."""
        for call in self._calls[: self.replicas()]:
            if call.begun:
                continue
            call.begun, call.since = True, call.since or time.monotonic()
            if self._followed and not self.in_steps():  # which tells of each item itself
                for parcel in {parcel for parcel, _ in call.owners}:
                    parcel.tell(self.pace, News())

    async def _pump(self) -> None:
        while True:
            pause_s = self._pause_s()
            if pause_s is not None and pause_s <= 0:
                call = self._take()
                self._calls.append(call)
                self._left_at = time.monotonic()
                self._begin()
                self._tell_places()
                call.task = asyncio.get_running_loop().create_task(self._run(call))
                # Not in `_run` itself, which never begins where all clients leave before its first step.
                call.task.add_done_callback(functools.partial(self._over, call))
                continue
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause_s)

    def _take(self) -> Call:
        """Items for as many turns as there is room for, and one at least."""
        owners: list[tuple[Parcel, int]] = []
        room, taken = min(self._room(), self.waiting), 0
        while self.waiting and (not owners or (taken < room and not self._better_cut(taken, room))):
            parcel, turns = self._parcels.take(max(1, room - taken))
            owners += [(parcel, place) for place in parcel.take(turns)]
            taken += turns
            self.waiting -= turns
        numbers = list(itertools.islice(self._numbers, len(owners)))
        left = sum(parcel.turns[place] for parcel, place in owners)
        return Call(owners, numbers, left, len(owners))

    async def _run(self, call: Call) -> None:
        now = time.monotonic()
        requests = Requests(
            [parcel.items[place] for parcel, place in call.owners],
            [max(0.0, parcel.deadline - now) for parcel, _ in call.owners],
            call.numbers,
            [number for other in self._calls for number in other.unwanted()],
            [number for (parcel, _), number in zip(call.owners, call.numbers, strict=True) if parcel.following],
            self.waiting,
            self.name,
        )
        turns, awake, started = call.left, self.replicas(), time.monotonic()
        try:
            await self.send(requests, lambda piece: self._deliver(call, piece))
            if awake:  # loading is not what an item takes
                self.pace.served(turns, started)
        except Exception as error:
            for parcel, _ in call.owners:
                if not parcel.done.done():
                    parcel.done.set_exception(error)

    def _over(self, call: Call, _: asyncio.Task[None]) -> None:
        self._calls.remove(call)
        self._begin()
        self._wake.set()

    def _deliver(self, call: Call, piece: Piece) -> None:
        shares = Shares()
        for row, place in enumerate(piece.places):
            parcel, own = call.owners[place]
            shares.add(parcel, own, row)
        for parcel, (places, rows) in shares.of.items():
            parcel.collector.put(places, piece.results, rows)
            parcel.settle()
            parcel.tell(self.pace)
        for place, refusal in piece.refusals.items():
            parcel, own = call.owners[place]
            parcel.collector.refuse(own, refusal)
            parcel.settle()
        for place, news in piece.news.items():
            call.owners[place][0].tell(self.pace, news)
        if not len(piece):
            return
        now, turns = time.monotonic(), call.turns((*piece.places, *piece.refusals))
        if call.since is not None:
            self.cost.observe(turns, now - call.since)
            self.linger.ended(turns, now - call.since)
        call.left -= turns
        call.items -= len(piece)
        call.since = now
        if self.waiting:
            self._wake.set()

    def _tell_places(self) -> None:
        """To those who follow what has not been sent: how many items come first."""
        if not self._followed:
            return
        ahead = sum(call.items for call in self._calls)
        for parcel in self._parcels:
            if not parcel.sent:
                parcel.tell(self.pace, News(ahead=ahead))
            ahead += len(parcel.items) - parcel.sent
