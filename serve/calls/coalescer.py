"""Holds the items that wait in this process for a model, and sends those of many requests as few large calls."""

from __future__ import annotations

import asyncio
import functools
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from deployments.batching.batch_cost import BatchCost, Linger
from deployments.collector import Collector, Shares
from deployments.messages import Answers, ItemProgress, Piece, Requests
from serve.caller import DEFAULT_TENANT
from serve.calls.pending import Call, Parcel
from serve.progress import Following
from serve.queues.fair_queue import FairQueue
from serve.queues.pace import Pace
from serve.waiting import within

LEAD, LEAD_S = 0.1, 0.01
"""How long before the end of the current call the next one is sent: a fraction of its time, as that is an estimate, and
the seconds that a call may need to be sent and prepared."""
SPLIT = 0.05
"""Largest per-item slowdown accepted to avoid splitting a request."""


Send = Callable[[Requests, Callable[[Piece], None]], Awaitable[None]]
"""Calls a replica and passes on answers as they come."""
GATHER_S = 0.005
"""Pause between calls to an engine that works in steps: a fraction of a step, and at most 200 calls a second."""


class Coalescer:
    """Sends what waits for a model as one call, and no more calls than keep its replicas busy.

    A hop between processes costs about a millisecond of CPU, and a request in it next to nothing. So each replica has
    one call to work on, and a second to prepare. The second is sent once it is full, or once it is as large as the
    first, if two such calls in turn are faster than one that all clients have to be back for. A lone replica gets it no
    sooner than it needs it. Later requests wait here, where a client can still withdraw at no cost. Answers come back
    batch by batch, so nobody waits for the slowest item of a call.

    If the engine works in steps and takes newcomers at each, a call is sent at once while replicas have room for it.

    Calls are filled in the order in which requests would finish if tenants took turns, and so did each tenant's
    requests. Neither a flood nor a long list holds up others. Work is counted in turns: the more text, the more turns.
    """

    def __init__(
        self,
        send: Send,
        max_call_turns: Callable[[], int],
        replicas: Callable[[], int],
        in_steps: Callable[[], bool] = lambda: False,
        pace: Pace | None = None,
        apart: bool = False,
    ) -> None:
        """`pace` measures how fast turns pass, to estimate waiting times.

        With `apart` each request has a call of its own, which ends when its client leaves: for requests that are few
        and long.
        """
        self.send = send
        self.max_call_turns = max_call_turns
        self.replicas = replicas
        self.in_steps = in_steps
        self.pace = pace or Pace()
        self.apart = apart
        self.name = secrets.token_hex(8)
        """Tells replicas which caller a call comes from."""
        self.waiting = 0
        """Turns that have not been sent."""
        self.cost = BatchCost()
        self.linger = Linger(self.cost)
        self._parcels: FairQueue[Parcel] = FairQueue(credit=max_call_turns())
        self._calls: list[Call] = []
        """In the order in which they were sent."""
        self.owners: dict[int, tuple[Parcel, int]] = {}
        """Those of all calls: a replica may report on all items in any one of them."""
        self._numbers = itertools.count(secrets.randbits(62))  # unlike any other caller's
        self._left_at = 0.0
        """When the last call was sent (time.monotonic)."""
        self._followed = 0
        """How many of the requests held here have a follower."""
        self._wake = asyncio.Event()
        self._pumping: asyncio.Task[None] | None = None

    @property
    def under_way(self) -> int:
        """Turns of items that have been sent but not answered."""
        return sum(call.left for call in self._calls)

    @property
    def alive(self) -> bool:
        """Whether the task that sends calls still runs."""
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

        `turns` is what each item takes: 1 if left out.
        """
        turns = turns or [1] * len(items)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        collector = Collector(len(items))
        parcel = Parcel(items, time.monotonic() + timeout_s, collector, done, following, tenant, weight, turns)
        self._parcels.credit = self.max_call_turns()
        self._parcels.put(parcel)
        self.waiting += parcel.size
        self._followed += following is not None
        self._report_places()
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
        """Drop the parcel's unsent items, and cancel calls that nobody waits for any more."""
        left = parcel.size - parcel.turns_taken
        if left:
            self._parcels.remove(parcel)
            self.waiting -= left
        if parcel.collector.left:
            parcel.done.cancel()
            for call in self._calls:
                if call.task and all(each.done.done() for each, _ in call.owners.values()):
                    call.task.cancel()

    def _pause_s(self) -> float | None:
        """Seconds to wait before the next call; None: until something else happens."""
        if not self.waiting:
            return None
        replicas = max(1, self.replicas())
        if self.in_steps():
            if not self._calls or (self.apart and self._room() > 0):
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
        """Seconds until a replica needs another call. Requests that come until then can still go ahead of others.

        Of several replicas, Serve chooses one with the fewest calls. Each must get one to prepare at once; otherwise
        the next call might go to a replica that has just begun, and another would stand idle.
        """
        [call, *others] = self._calls
        if others or call.since is None:
            return 0.0
        return call.since + (1 - LEAD) * self.cost.seconds(call.left) - LEAD_S - time.monotonic()

    def _room(self) -> int:
        """Turns that the next call has room for."""
        most = self.max_call_turns()
        return min(most, most * max(1, self.replicas()) - self.under_way) if self.in_steps() else most

    def _is_faster_apart(self, under_way: int) -> bool:
        """Whether two calls in turn are faster than one that all clients have to be back for."""
        turns = under_way + self.waiting
        together = min(turns, self.max_call_turns())
        apart_s = self.cost.seconds(turns) + self.cost.fixed
        return turns * (self.cost.seconds(together) + self.linger.back_s) >= together * apart_s

    def _better_cut(self, turns: int, room: int) -> bool:
        """Whether a call of so many turns is nearly as fast per turn as a full one with a part of the next request.

        That part would delay the others without helping its own request, as the rest comes with the next call.
        """
        splits = room - turns < self._parcels.next_turns <= self.max_call_turns()
        if not turns or not splits or self.in_steps():
            return False
        return self.cost.seconds(turns) * room < (1 + SPLIT) * self.cost.seconds(room) * turns

    def _begin(self) -> None:
        """Mark the first calls as begun, one per replica."""
        for call in self._calls[: self.replicas()]:
            if call.begun:
                continue
            call.begun, call.since = True, call.since or time.monotonic()
            if self._followed and not self.in_steps():  # such an engine reports on each item itself
                for parcel in {parcel for parcel, _ in call.owners.values()}:
                    parcel.report(self.pace, ItemProgress())

    async def _pump(self) -> None:
        while True:
            pause_s = self._pause_s()
            if pause_s is not None and pause_s <= 0:
                call = self._take()
                self._calls.append(call)
                self._left_at = time.monotonic()
                self._begin()
                self._report_places()
                call.task = asyncio.get_running_loop().create_task(self._run(call))
                # Not in `_run` itself, which never starts if all clients leave before its first step.
                call.task.add_done_callback(functools.partial(self._ended, call))
                continue
            self._wake.clear()
            await within(self._wake, pause_s)

    def _take(self) -> Call:
        """Items for as many turns as there is room for, but at least one."""
        owners: dict[int, tuple[Parcel, int]] = {}
        room, taken = min(self._room(), self.waiting), 0
        while self.waiting and (not owners or (taken < room and not self.apart and not self._better_cut(taken, room))):
            parcel, turns = self._parcels.take(max(1, room - taken))
            owners |= {next(self._numbers): (parcel, place) for place in parcel.take(turns)}
            taken += turns
            self.waiting -= turns
        self.owners |= owners
        return Call(owners, sum(parcel.turns[place] for parcel, place in owners.values()), len(owners))

    async def _run(self, call: Call) -> None:
        now = time.monotonic()
        requests = Requests(
            [parcel.items[place] for parcel, place in call.owners.values()],
            [max(0.0, parcel.deadline - now) for parcel, _ in call.owners.values()],
            list(call.owners),
            [number for other in self._calls for number in other.unwanted()],
            [number for number, (parcel, _) in call.owners.items() if parcel.following],
            self.waiting,
            self.name,
        )
        turns, awake, started = call.left, self.replicas(), time.monotonic()
        try:
            await self.send(requests, lambda piece: self._deliver(call, piece))
            if awake:  # time spent loading is not time per item
                self.pace.served(turns, started)
        except Exception as error:
            for parcel, _ in call.owners.values():
                if not parcel.done.done():
                    parcel.done.set_exception(error)

    def _ended(self, call: Call, _: asyncio.Task[None]) -> None:
        self._calls.remove(call)
        for number in call.owners:
            del self.owners[number]
        self._begin()
        self._wake.set()

    def _deliver(self, call: Call, piece: Piece) -> None:
        shares = Shares()
        for row, number in enumerate(piece.numbers):
            parcel, place = call.owners[number]
            shares.add(parcel, place, row)
        for parcel, (places, rows) in shares.of.items():
            parcel.collector.put(places, piece.results, rows)
            parcel.settle()
            parcel.report(self.pace)
        for number, refusal in piece.refusals.items():
            parcel, place = call.owners[number]
            parcel.collector.refuse(place, refusal)
            parcel.settle()
        for number, progress in piece.progress.items():
            if owner := self.owners.get(number):
                owner[0].report(self.pace, progress, owner[1])
        if not len(piece):
            return
        now, turns = time.monotonic(), call.turns(piece.answered)
        if call.since is not None:
            self.cost.observe(turns, now - call.since)
            self.linger.ended(turns, now - call.since)
        call.left -= turns
        call.items -= len(piece)
        call.since = now
        if self.waiting:
            self._wake.set()

    def _report_places(self) -> None:
        """Tell followers of unsent requests how many items come first."""
        if not self._followed:
            return
        ahead = sum(call.items for call in self._calls)
        for parcel in self._parcels:
            if not parcel.sent:
                parcel.report(self.pace, ItemProgress(ahead=ahead))
            ahead += len(parcel.items) - parcel.sent
