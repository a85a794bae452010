"""When a refused client should come back, and signed tickets that hold a place for it until then.

Under overload a retry time alone does not help: those who come back meet the same crowd. So a refusal reserves a place
in the queue for later, behind earlier reservations. A client that brings its ticket at that time is admitted ahead of
newcomers. All amounts of work here are in turns; a request in a lane is one turn.
"""

from __future__ import annotations

import base64
import bisect
import hashlib
import hmac
import math
import secrets
import struct
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from serve import errors
from serve.errors import DureError
from serve.queues.pace import Pace

FOR_TICKETS = 0.8
"""Largest part of the pace that tickets may use. The rest is for newcomers, and in case the pace was overestimated."""
FOR_NEWCOMERS = 0.25
"""Part of a queue that is never held for tickets. On average, ticket holders find the queue this full."""
BUCKET = 1 / 8
"""Length of a bucket of due times, as a fraction of the time to serve a full queue; rounding up may double it. No more
turns come due in a bucket than are served in that time. Simulated with lists of 32, of which 24 may wait, at four times
capacity: 89 % of tickets were admitted with 1/2, 95 % with 1/4 and 99 % with 1/8.
"""
MAX_BUCKET_S = 0.5
"""Upper bound on what BUCKET gives, however long the queue."""
MAX_WAIT_S = 60
"""Longest wait that a ticket is given for; further ahead the pace is a guess."""
LONGEST_S = 300
"""Clients without a ticket are told to come back after those with one, but in no more than this."""
VALID_S = 15
"""A ticket stays valid for this long after its due time."""
HELD_S = 1
"""Room is held for a ticket until this long after its due time; then it counts as one that does not come back."""
EARLY_S = 0.3
"""A ticket may come this early: clocks differ, and `Retry-After` is in whole seconds."""
REMEMBERED = 0.98
"""Each ticket that came back or did not multiplies the weight of all earlier ones by this."""
STANDS = 0.25
"""How long a refusal without a ticket stands, as a fraction of the time to serve all that waits now. Too little leaves
the queue in that time for it to run empty."""
MAX_STANDS_S = 1.0
KEPT_LENGTHS = 4
"""Reservations are kept by buckets of so many lengths; the length in use changes with the pace and the request."""
SIGNED_BYTES = 16
FORMAT = struct.Struct(">QQ")


@dataclass(frozen=True)
class Refused:
    """The queue has no room."""

    waiting: int
    retry_after_s: int
    ticket: str | None
    """To be sent with the next try, at that time; None if no place is held for it."""
    each_s: float = 0.0
    """Without a ticket: how much later the tenant's next newcomer should come."""
    stands_s: float = 0.0
    """Without a ticket: how long other newcomers of the tenant would be refused as well."""

    def error(self, name: str) -> DureError:
        """The error for a client of the queue with this name."""
        return errors.queue_full(name, self.waiting, self.retry_after_s, self.ticket)


@dataclass(frozen=True)
class Coming:
    """The tickets that come due while a full queue is served, as far as they are expected to come back."""

    turns: int
    own: int
    """Turns of one tenant."""
    tenants: Collection[str]
    """Tenants with such tickets."""
    capacity: int
    """Turns that fit in the queue."""

    @property
    def held(self) -> int:
        """Turns that newcomers must leave room for.

        This covers more than the tickets due while the present queue is served: tickets come unevenly, and newcomers
        take any room at once.
        """
        return min(self.turns, self.capacity - max(1, int(FOR_NEWCOMERS * self.capacity)))


@dataclass(frozen=True, order=True)
class Reservation:
    """A place held for a ticket. `number` is random, and identifies the ticket."""

    due: float
    number: int
    tenant: str
    turns: int


class Buckets:
    """Reserved turns by due time, in buckets of equal length; a refusal searches up to a minute of them."""

    def __init__(self, length_s: float) -> None:
        self.length_s = length_s
        self._turns: dict[float, Counter[str]] = {}
        """By the number of the bucket, then by tenant."""

    def add(self, reservation: Reservation) -> None:
        self._turns.setdefault(reservation.due // self.length_s, Counter())[reservation.tenant] += reservation.turns

    def remove(self, reservation: Reservation) -> None:
        bucket = reservation.due // self.length_s
        self._turns[bucket][reservation.tenant] -= reservation.turns
        self._turns[bucket] = +self._turns[bucket]
        if not self._turns[bucket]:
            del self._turns[bucket]

    def beside(self, tenant: str, turns: int, due: float) -> int:
        """Turns already in the bucket at `due` that count against a tenant adding `turns`.

        Another tenant's turns count up to what this tenant would have there itself, so that early tenants with many
        turns leave room for those with few.
        """
        near = self._turns.get(due // self.length_s)
        if not near:
            return 0
        own = near.get(tenant, 0)
        if len(near) == 1 and own:
            return own
        return sum(min(others, own + turns) for others in near.values())


class Tickets:
    """Issues and redeems the tickets of one queue. Instances with the same `key` and `name` honour each other's."""

    def __init__(self, name: str, key: bytes, clock: Callable[[], float] = time.time) -> None:
        self.name = name
        self.key = key
        self.clock = clock
        self.pace = Pace()
        self._reserved: list[Reservation] = []
        """Sorted by due time."""
        self._turns: Counter[str] = Counter()
        """Reserved turns by tenant."""
        self._buckets: dict[float, Buckets] = {}
        """All reservations, in buckets of several lengths, by length."""
        self._ended = self._redeemed = 2.0
        """Own tickets whose time is over, and tickets of any process that came back. Recent ones weigh most."""
        self._used: dict[int, float] = {}
        """Due time of each ticket redeemed, by number."""
        self._beyond: dict[str, float] = {}
        """By tenant: when its last newcomer without a ticket is to come back."""

    def refuse(
        self,
        tenant: str,
        waiting: int,
        capacity: int,
        turns: int = 1,
        token: str | None = None,
        own: int | None = None,
        share: float = 1,
    ) -> Refused:
        """Refuse a request that takes `turns`, with a ticket if one can be given.

        `waiting` turns are waiting in a queue that holds `capacity`. The tenant has `own` of them, or all if that is
        None, and it gets this `share` of the pace. A ticket that came before its time is given back as it is.
        """
        now = self.clock()
        early = self._read(token, tenant)
        if early and early[0] > now + EARLY_S:
            return Refused(waiting, math.ceil(early[0] - now), token)
        self._forget(now)
        turn_s = self.pace.seconds_per_turn / FOR_TICKETS
        ahead = max(0, (waiting if own is None else own) - int(FOR_NEWCOMERS * capacity))
        wait_s = (ahead + self.returning * self._turns[tenant] + turns) * turn_s / share
        # A power of two, so that buckets stay the same while the pace changes a little.
        bucket_s = 2.0 ** math.ceil(math.log2(max(2 * turns * turn_s, min(BUCKET * capacity * turn_s, MAX_BUCKET_S))))
        buckets = self._buckets_of(bucket_s)
        most_beside = (bucket_s / turn_s - turns) / max(self.returning, 1e-9)
        first = max(1, math.ceil(wait_s))
        for retry_after_s in range(first, MAX_WAIT_S + 1):  # whole seconds make crowds, which the queue must hold
            due = round(now + retry_after_s, 3)
            if buckets.beside(tenant, turns, due) <= most_beside:
                break
        else:
            due = self.put_off(tenant, turns * turn_s / share)
            stands_s = min(STANDS * waiting * self.pace.seconds_per_turn, MAX_STANDS_S)
            return Refused(waiting, math.ceil(round(due - now, 3)), None, turns * turn_s / share, stands_s)
        reservation = Reservation(due, secrets.randbits(63), tenant, turns)
        bisect.insort(self._reserved, reservation)
        self._turns[tenant] += turns
        for each in self._buckets.values():
            each.add(reservation)
        return Refused(waiting, retry_after_s, self._token(reservation))

    def put_off(self, tenant: str, seconds: float) -> float:
        """When a newcomer without a ticket, which takes `seconds` to serve, should come back, on the tickets' clock.

        It is sent behind the tenant's earlier ones. Otherwise they would all come as soon as there are tickets again.
        """
        now = self.clock()
        due = min(max(self._beyond.get(tenant, 0.0), now + MAX_WAIT_S) + seconds, now + LONGEST_S)
        self._beyond = {name: time for name, time in self._beyond.items() if time > now + MAX_WAIT_S} | {tenant: due}
        return due

    def redeem(self, token: str | None, tenant: str) -> bool:
        """Whether this ticket lets its tenant go ahead of newcomers: once, and at its time."""
        now = self.clock()
        self._forget(now)
        read = self._read(token, tenant)
        if read is None or not now - VALID_S <= read[0] <= now + EARLY_S or read[1] in self._used:
            return False
        due, number = read
        self._used[number] = due
        self._redeemed += 1
        at = bisect.bisect_left(self._reserved, (due, number), key=lambda each: (each.due, each.number))
        if at < len(self._reserved) and self._reserved[at].number == number:
            self._end(at)
        return True

    def coming(self, capacity: int, tenant: str) -> Coming:
        """The tickets that come due before `capacity` turns, a full queue, have been served."""
        now = self.clock()
        self._forget(now)
        end = bisect.bisect(self._reserved, now + capacity * self.pace.seconds_per_turn, key=lambda each: each.due)
        if len(self._turns) > 1:
            of: Counter[str] = Counter()
            for each in self._reserved[:end]:
                of[each.tenant] += each.turns
        else:  # for a tenant alone, the average reservation will do, which spares the walk
            of = Counter({name: round(end * turns / len(self._reserved)) for name, turns in self._turns.items() if end})
        return Coming(round(self.returning * of.total()), round(self.returning * of[tenant]), of.keys(), capacity)

    @property
    def returning(self) -> float:
        """Fraction of issued tickets that come back."""
        return min(1.0, self._redeemed / self._ended)

    @property
    def outstanding(self) -> int:
        """Tickets for which room is or will be held."""
        self._forget(self.clock())
        return len(self._reserved)

    def _buckets_of(self, length_s: float) -> Buckets:
        buckets = self._buckets.pop(length_s, None)
        if buckets is None:
            buckets = Buckets(length_s)
            for reservation in self._reserved:
                buckets.add(reservation)
        self._buckets[length_s] = buckets  # last, so that the length used least recently goes first
        if len(self._buckets) > KEPT_LENGTHS:
            del self._buckets[next(iter(self._buckets))]
        return buckets

    def _end(self, at: int) -> None:
        """Remove the reservation at this index, whose ticket has come back or is not expected any more."""
        ended = self._reserved.pop(at)
        self._turns[ended.tenant] -= ended.turns
        if not self._turns[ended.tenant]:
            del self._turns[ended.tenant]
        for buckets in self._buckets.values():
            buckets.remove(ended)
        self._ended = REMEMBERED * self._ended + 1
        self._redeemed *= REMEMBERED

    def _forget(self, now: float) -> None:
        while self._reserved and self._reserved[0].due < now - HELD_S:
            self._end(0)
        while self._used and next(iter(self._used.values())) < now - 2 * VALID_S:
            del self._used[next(iter(self._used))]

    def _token(self, reservation: Reservation) -> str:
        payload = FORMAT.pack(round(1000 * reservation.due), reservation.number)
        return base64.urlsafe_b64encode(payload + self._signature(payload, reservation.tenant)).decode()

    def _read(self, token: str | None, tenant: str) -> tuple[float, int] | None:
        """A ticket's due time and number; None unless this queue issued it to this tenant."""
        try:
            decoded = base64.b64decode(token or "", b"-_", validate=True)
        except ValueError:
            return None
        payload, signature = decoded[: FORMAT.size], decoded[FORMAT.size :]
        if len(payload) < FORMAT.size or not hmac.compare_digest(signature, self._signature(payload, tenant)):
            return None
        due_ms, number = FORMAT.unpack(payload)
        return due_ms / 1000, number

    def _signature(self, payload: bytes, tenant: str) -> bytes:
        signed = payload + f"{self.name}\0{tenant}".encode()
        return hmac.digest(self.key, signed, hashlib.sha256)[:SIGNED_BYTES]
