"""When a refused client should come back: a queue outside the queue, kept by signed tickets.

Under overload no retry time is right by itself: refused clients come back into the same crowd. So a refusal reserves a
place in the queue for later, behind earlier reservations. A client that brings its ticket at that time is admitted
ahead of newcomers.
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
"""Largest share of capacity given to tickets. The rest is for newcomers, and for a pace that was measured too fast."""
FOR_NEWCOMERS = 0.25
"""Share of a queue that is never held for tickets. On average, ticket holders find the queue this full."""
SLOT = 1 / 8
"""Length of a slot as a fraction of the time to serve a full queue; rounding up makes it at most twice as long. No more
tickets come due in a slot than are served in it. Simulated with lists of 32, of which 24 may wait, at four times
capacity: 89 % of tickets were admitted with 1/2, 95 % with 1/4 and 99 % with 1/8.
"""
SLOT_S = 0.5
"""Upper bound on what SLOT gives, however long the queue."""
MAX_WAIT_S = 60
"""Longest wait that a ticket is given for; further ahead the pace is a guess."""
LONGEST_S = 300
"""Clients without a ticket are told to come back after those with one, but no later than this."""
VALID_S = 15
"""A ticket stays valid for this long after its due time."""
HELD_S = 1
"""Room is held for a ticket for this long after its due time; then it counts as not returning."""
EARLY_S = 0.3
"""A ticket may come this early: clocks differ, and `Retry-After` is in whole seconds."""
REMEMBERED = 0.98
"""Weight that the record of earlier tickets keeps with each new one that came back or did not."""
STANDS = 0.25
"""How long a refusal without a ticket stands, as a fraction of the time to serve all that waits now. So little has left
by then that the queue is in no danger of running empty."""
MAX_STANDS_S = 1.0
KEPT_SLOTS = 4
"""Slot lengths kept; they change with the pace and the size of requests."""
SIGNED_BYTES = 16
FORMAT = struct.Struct(">QQ")


@dataclass(frozen=True)
class Refused:
    """The queue has no room."""

    waiting: int
    retry_after_s: int
    ticket: str | None
    """To be sent back at that time; None if the time is not a promise."""
    each_s: float = 0.0
    """Without a ticket: how much later the tenant's next newcomer should come."""
    stands_s: float = 0.0
    """Without a ticket: how long other newcomers of the tenant would be refused as well."""

    def error(self, name: str) -> DureError:
        """The error for a client of the queue with this name."""
        return errors.queue_full(name, self.waiting, self.retry_after_s, self.ticket)


@dataclass(frozen=True)
class Coming:
    """Tickets that come due while a full queue is served."""

    items: int
    own: int
    """Items of one tenant."""
    tenants: Collection[str]
    """Tenants with such tickets."""
    most: int
    """Capacity of the queue, in items."""

    @property
    def held(self) -> int:
        """Items that newcomers must leave room for.

        This covers more than the tickets due while the present queue is served: tickets come unevenly, and newcomers
        take any room at once.
        """
        return min(self.items, self.most - max(1, int(FOR_NEWCOMERS * self.most)))


@dataclass(frozen=True, order=True)
class Reservation:
    due: float
    number: int
    tenant: str
    items: int


class Slots:
    """Reserved items by due time, in slots of equal length; a refusal searches up to a minute of them."""

    def __init__(self, slot_s: float) -> None:
        self.slot_s = slot_s
        self._items: dict[float, Counter[str]] = {}

    def add(self, reservation: Reservation) -> None:
        self._items.setdefault(reservation.due // self.slot_s, Counter())[reservation.tenant] += reservation.items

    def remove(self, reservation: Reservation) -> None:
        slot = reservation.due // self.slot_s
        self._items[slot][reservation.tenant] -= reservation.items
        self._items[slot] = +self._items[slot]
        if not self._items[slot]:
            del self._items[slot]

    def beside(self, tenant: str, items: int, due: float) -> int:
        """Items already in the slot at `due` that count against a tenant adding `items`.

        Another tenant's items count up to what this tenant would have there itself, so that early tenants with many
        items leave room for those with few.
        """
        near = self._items.get(due // self.slot_s)
        if not near:
            return 0
        own = near.get(tenant, 0)
        if len(near) == 1 and own:
            return own
        return sum(min(others, own + items) for others in near.values())


class Tickets:
    """Issues and redeems the tickets of one queue. Instances with the same `key` and `name` honour each other's."""

    def __init__(self, name: str, key: bytes, clock: Callable[[], float] = time.time) -> None:
        self.name = name
        self.key = key
        self.clock = clock
        self.pace = Pace()
        self._reserved: list[Reservation] = []
        """Sorted by due time."""
        self._items: Counter[str] = Counter()
        """Reserved items by tenant."""
        self._slots: dict[float, Slots] = {}
        """The reservations by slot, for several slot lengths."""
        self._ended = self._redeemed = 2.0
        """Tickets whose time is over, and tickets that came back, maybe other processes'. Recent ones weigh most."""
        self._used: dict[int, float] = {}
        self._beyond: dict[str, float] = {}
        """By tenant: when its last newcomer without a ticket is to come back."""

    def refuse(
        self,
        tenant: str,
        waiting: int,
        most: int,
        items: int = 1,
        token: str | None = None,
        held: int | None = None,
        share: float = 1,
    ) -> Refused:
        """Refuse a request for `items`, with a ticket if one can be given.

        `waiting` items wait in a queue for `most`, `held` of them the tenant's, which gets this `share` of the turns.
        A ticket whose time has not come stays as it is.
        """
        now = self.clock()
        early = self._read(token, tenant)
        if early and early[0] > now + EARLY_S:
            return Refused(waiting, math.ceil(early[0] - now), token)
        self._forget(now)
        item_s = self.pace.seconds_per_item / FOR_TICKETS
        ahead = max(0, (waiting if held is None else held) - int(FOR_NEWCOMERS * most))
        wait_s = (ahead + self.returning * self._items[tenant] + items) * item_s / share
        # A power of two, so that slots stay the same while the pace changes a little.
        slot_s = 2.0 ** math.ceil(math.log2(max(2 * items * item_s, min(SLOT * most * item_s, SLOT_S))))
        slots = self._slots_of(slot_s)
        most_beside = (slot_s / item_s - items) / max(self.returning, 1e-9)
        first = max(1, math.ceil(wait_s))
        for retry_after_s in range(first, MAX_WAIT_S + 1):  # whole seconds make crowds, which the queue must hold
            due = round(now + retry_after_s, 3)
            if slots.beside(tenant, items, due) <= most_beside:
                break
        else:
            due = self.put_off(tenant, items * item_s / share)
            stands_s = min(STANDS * waiting * self.pace.seconds_per_item, MAX_STANDS_S)
            return Refused(waiting, math.ceil(round(due - now, 3)), None, items * item_s / share, stands_s)
        reservation = Reservation(due, secrets.randbits(63), tenant, items)
        bisect.insort(self._reserved, reservation)
        self._items[tenant] += items
        for each in self._slots.values():
            each.add(reservation)
        return Refused(waiting, retry_after_s, self._token(reservation))

    def put_off(self, tenant: str, seconds: float) -> float:
        """When a newcomer without a ticket, which takes `seconds` to serve, should come back, on the tickets' clock.

        It comes after the tenant's others, which would be a crowd if all came once tickets are available again.
        """
        now = self.clock()
        due = min(max(self._beyond.get(tenant, 0.0), now + MAX_WAIT_S) + seconds, now + LONGEST_S)
        self._beyond = {name: time for name, time in self._beyond.items() if time > now + MAX_WAIT_S} | {tenant: due}
        return due

    def redeem(self, token: str | None, tenant: str) -> bool:
        """Whether this ticket lets its tenant go ahead of newcomers. It does so once, at its time."""
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

    def coming(self, most: int, tenant: str) -> Coming:
        """Tickets that come due before `most` items, a full queue, have been served."""
        now = self.clock()
        self._forget(now)
        end = bisect.bisect(self._reserved, now + most * self.pace.seconds_per_item, key=lambda each: each.due)
        if len(self._items) > 1:
            of: Counter[str] = Counter()
            for each in self._reserved[:end]:
                of[each.tenant] += each.items
        else:
            of = Counter({name: round(end * items / len(self._reserved)) for name, items in self._items.items() if end})
        return Coming(round(self.returning * of.total()), round(self.returning * of[tenant]), of.keys(), most)

    @property
    def returning(self) -> float:
        """Share of issued tickets that come back."""
        return min(1.0, self._redeemed / self._ended)

    @property
    def outstanding(self) -> int:
        """Tickets for which room is or will be held."""
        self._forget(self.clock())
        return len(self._reserved)

    def _slots_of(self, slot_s: float) -> Slots:
        slots = self._slots.pop(slot_s, None)
        if slots is None:
            slots = Slots(slot_s)
            for reservation in self._reserved:
                slots.add(reservation)
        self._slots[slot_s] = slots
        if len(self._slots) > KEPT_SLOTS:
            del self._slots[next(iter(self._slots))]
        return slots

    def _end(self, at: int) -> None:
        over = self._reserved.pop(at)
        self._items[over.tenant] -= over.items
        if not self._items[over.tenant]:
            del self._items[over.tenant]
        for slots in self._slots.values():
            slots.remove(over)
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
