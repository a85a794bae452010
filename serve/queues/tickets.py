"""When who was refused is to come back: a queue outside the queue, kept by signed tickets.

With more load than there is room for, no time to come back can be right by itself: who was refused comes back into the
same crowd. So a refusal reserves a place in the queue for later, behind those reserved before, and whoever brings its
ticket at that time is let in where a newcomer is not.
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
"""Of what is served, at most; the rest is for newcomers, and for a pace that was measured too fast."""
FOR_NEWCOMERS = 0.25
"""Of a queue, the part that is never held for tickets; who comes back finds it as full as this on average."""
SLOT = 1 / 8
"""Of the time that a full queue takes: in so long, or twice that, come no more tickets than are served then. Simulated
with lists of 32, of which 24 may wait, at four times what can be borne: of the tickets 89 % were let in with 1/2, 95 %
with 1/4 and 99 % with 1/8.
"""
SLOT_S = 0.5
"""The longest that SLOT makes it, however long the queue."""
MAX_WAIT_S = 60
"""The longest time that a ticket is given for: further ahead the pace is a guess."""
LONGEST_S = 300
"""Who gets no ticket is told to come back behind those who did, but not later than this."""
VALID_S = 15
"""After its time a ticket is good for this long."""
HELD_S = 1
"""After its time room is held for a ticket for this long; then it counts as one that does not come back."""
EARLY_S = 0.3
"""A ticket may come this much before its time: clocks differ, and a second is as fine as `Retry-After` gets."""
REMEMBERED = 0.98
"""Weight of what was known of tickets before each new one that came back or did not."""
STANDS = 0.25
"""Of the time that all take who wait now, the part for which a refusal without a ticket stands: so few have left then
that the queue is in no danger of running empty."""
MAX_STANDS_S = 1.0
KEPT_SLOTS = 4
"""Lengths of slots: they follow the pace and the size of what is asked for."""
SIGNED_BYTES = 16
FORMAT = struct.Struct(">QQ")


@dataclass(frozen=True)
class Refused:
    """There is no room."""

    waiting: int
    retry_after_s: int
    ticket: str | None
    """To be sent back then; None where the time to come back is no promise."""
    each_s: float = 0.0
    """Without a ticket: by how much later the next of its tenant is to come."""
    stands_s: float = 0.0
    """Without a ticket: for so long others of its tenant would hear the same."""

    def error(self, name: str) -> DureError:
        """What a client of the queue with this name is told."""
        return errors.queue_full(name, self.waiting, self.retry_after_s, self.ticket)


@dataclass(frozen=True)
class Coming:
    """What is to come back with tickets while a full queue is served."""

    items: int
    own: int
    """Of one tenant's."""
    tenants: Collection[str]
    """Whose it is."""
    most: int
    """Items that the queue holds."""

    @property
    def held(self) -> int:
        """For how many items newcomers have to leave room.

        Not only for those who come while what waits now is served: tickets come more at times and less at others, and
        newcomers take what room there is at once.
        """
        return min(self.items, self.most - max(1, int(FOR_NEWCOMERS * self.most)))


@dataclass(frozen=True, order=True)
class Reservation:
    due: float
    number: int
    tenant: str
    items: int


class Slots:
    """Reservations by when they are due, in slots of the same length: a refusal looks at up to a minute of them."""

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
        """Items in the slot of a time that a tenant with `items` more has to respect: of others not more than it would
        have there itself, so that who came first with many leaves room for those with few."""
        near = self._items.get(due // self.slot_s)
        if not near:
            return 0
        own = near.get(tenant, 0)
        if len(near) == 1 and own:
            return own
        return sum(min(others, own + items) for others in near.values())


class Tickets:
    """Gives tickets for one queue and takes them back. All who share `key` and `name` honour each other's."""

    def __init__(self, name: str, key: bytes, clock: Callable[[], float] = time.time) -> None:
        self.name = name
        self.key = key
        self.clock = clock
        self.pace = Pace()
        self._reserved: list[Reservation] = []
        """By time."""
        self._items: Counter[str] = Counter()
        """Of them, by tenant."""
        self._slots: dict[float, Slots] = {}
        """The same by slots of some lengths."""
        self._ended = self._redeemed = 2.0
        """Tickets whose time is over and those that came back, of which some may be others'; the last ones count."""
        self._used: dict[int, float] = {}
        self._beyond: dict[str, float] = {}
        """When the last of a tenant's without a ticket is to come."""

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
        """`waiting` items wait where `most` may, `held` of them the tenant's, which has this `share` of the turns.

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
        # A power of two: slots stay where they are while the pace changes a little.
        slot_s = 2.0 ** math.ceil(math.log2(max(2 * items * item_s, min(SLOT * most * item_s, SLOT_S))))
        slots = self._slots_of(slot_s)
        most_beside = (slot_s / item_s - items) / max(self.returning, 1e-9)
        first = max(1, math.ceil(wait_s))
        for retry_after_s in range(first, MAX_WAIT_S + 1):  # whole seconds make crowds, which the queue has to hold
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
        """When a newcomer is to come who gets no ticket and will take so long, on the tickets' clock.

        Behind the tenant's others, as they would be a crowd if they all came when tickets are to be had again.
        """
        now = self.clock()
        due = min(max(self._beyond.get(tenant, 0.0), now + MAX_WAIT_S) + seconds, now + LONGEST_S)
        self._beyond = {name: time for name, time in self._beyond.items() if time > now + MAX_WAIT_S} | {tenant: due}
        return due

    def redeem(self, token: str | None, tenant: str) -> bool:
        """Does this ticket of the tenant's let it go ahead of newcomers? It does so once, at its time."""
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
        """Before `most` items, a full queue, have been served."""
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
        """Of the tickets given, the share that comes back."""
        return min(1.0, self._redeemed / self._ended)

    @property
    def outstanding(self) -> int:
        """Tickets that room is held for, or will be."""
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
        told = FORMAT.pack(round(1000 * reservation.due), reservation.number)
        return base64.urlsafe_b64encode(told + self._signature(told, reservation.tenant)).decode()

    def _read(self, token: str | None, tenant: str) -> tuple[float, int] | None:
        """A ticket's time and number; None where it is not one of this queue's to this tenant."""
        try:
            told = base64.b64decode(token or "", b"-_", validate=True)
        except ValueError:
            return None
        told, signature = told[: FORMAT.size], told[FORMAT.size :]
        if len(told) < FORMAT.size or not hmac.compare_digest(signature, self._signature(told, tenant)):
            return None
        due_ms, number = FORMAT.unpack(told)
        return due_ms / 1000, number

    def _signature(self, told: bytes, tenant: str) -> bytes:
        signed = told + f"{self.name}\0{tenant}".encode()
        return hmac.digest(self.key, signed, hashlib.sha256)[:SIGNED_BYTES]
