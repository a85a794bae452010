"""Events: written in the transaction of the change that leads to them, then delivered at least once."""

from __future__ import annotations

import datetime
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, CursorResult, and_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from serve import errors
from serve.store.database import Database, changes
from serve.store.tables import Event, Job, now

State = Literal["pending", "delivered", "dead", "no_webhook"]

NO_WEBHOOK = "there was no webhook when the event happened"
UNTRIED_S = 86_400.0
"""With a webhook, an event is tried within seconds. One that has not been tried for longer than this was recorded while
there was none, by a version that kept such events pending; a webhook that comes later is not flooded with them. A day,
because Dure may go down for hours just after it records an event, and that one is still delivered."""
AT_ONCE = 1000


PENDING: dict[str, Any] = {"state": "pending", "last_error": None}
UNSENT: dict[str, Any] = {"state": "no_webhook", "last_error": NO_WEBHOOK}


@dataclass(frozen=True)
class Delivery:
    """An event that only this process may deliver until its claim ends."""

    event_id: uuid.UUID
    payload: dict[str, Any]
    attempt: int
    """From 1."""


def event_of(
    kind: str,
    tenant_id: str,
    job_id: uuid.UUID,
    job_variants_id: uuid.UUID,
    vlm_trace_id: uuid.UUID,
    to_webhook: bool,
) -> Event:
    """The event that a finished stage leads to. It has the trace's id, so each run of a stage leads to one event.

    Without a webhook it is only recorded.
    """
    at = now()
    payload = {
        "event_id": str(vlm_trace_id),
        "type": kind,
        "tenant_id": tenant_id,
        "job_id": str(job_id),
        "job_variants_id": str(job_variants_id),
        "vlm_trace_id": str(vlm_trace_id),
        "created_at": at.isoformat(),
    }
    return Event(
        event_id=vlm_trace_id,
        job_id=job_id,
        kind=kind,
        payload=payload,
        due_at=at,
        created_at=at,
        **(PENDING if to_webhook else UNSENT),
    )


class Outbox:
    def __init__(self, database: Database, claim_s: float) -> None:
        self.database = database
        self.claim_s = claim_s

    async def claim(self, count: int) -> list[Delivery]:
        """Up to `count` events that are due; no other process gets them within `claim_s`."""

        async def read(session: AsyncSession) -> list[uuid.UUID]:
            due = select(Event.event_id).where(Event.state == "pending", Event.due_at <= now(), ~_untried())
            return list(await session.scalars(due.order_by(Event.due_at).limit(count)))

        async def write(session: AsyncSession) -> list[Delivery]:
            claimed = []
            for event_id in due:
                changed = await changes(
                    session,
                    update(Event)
                    .where(Event.event_id == event_id, Event.state == "pending", Event.due_at <= now())
                    .values(due_at=now() + datetime.timedelta(seconds=self.claim_s), attempts=Event.attempts + 1),
                )
                if changed:
                    event = await session.get_one(Event, event_id)
                    claimed.append(Delivery(event_id, event.payload, event.attempts))
            return claimed

        due = await self.database.read(read)
        return await self.database.write(write) if due else []

    async def delivered(self, event_id: uuid.UUID) -> None:
        await self._set(event_id, state="delivered", last_error=None)

    async def failed(self, event_id: uuid.UUID, reason: str, retry_s: float | None) -> None:
        """Record a failed attempt. The next one is due after `retry_s`; None: there is none."""
        if retry_s is None:
            await self._set(event_id, state="dead", last_error=reason)
        else:
            await self._set(event_id, due_at=now() + datetime.timedelta(seconds=retry_s), last_error=reason)

    async def _set(self, event_id: uuid.UUID, **values: Any) -> None:
        async def write(session: AsyncSession) -> None:
            await session.execute(
                update(Event).where(Event.event_id == event_id, Event.state != "delivered").values(**values)
            )

        await self.database.write(write)

    async def set_aside(self, to_webhook: bool) -> int:
        """End events that are not to be delivered any more; returns how many.

        With a webhook these are the events that have not been tried for long; without one, all that are due.
        """
        which = Event.event_id.in_(
            select(Event.event_id)
            .where(Event.state == "pending", _untried() if to_webhook else Event.due_at <= now())
            .limit(AT_ONCE)
        )

        async def write(session: AsyncSession) -> int:
            result = await session.execute(update(Event).where(which, Event.state == "pending").values(**UNSENT))
            assert isinstance(result, CursorResult)
            return result.rowcount

        ended = 0
        while count := await self.database.write(write):
            ended += count
        return ended

    async def list(self, tenant_id: str, state: State | None, limit: int) -> list[dict[str, Any]]:
        """A tenant's events, the newest first."""

        async def read(session: AsyncSession) -> list[dict[str, Any]]:
            events = select(Event).join(Job, Job.job_id == Event.job_id).where(Job.tenant_id == tenant_id)
            if state is not None:
                events = events.where(Event.state == state)
            newest = events.order_by(Event.created_at.desc(), Event.event_id).limit(limit)
            return [_shown(event) for event in await session.scalars(newest)]

        return await self.database.read(read)

    async def deliver_again(self, tenant_id: str, event_id: uuid.UUID) -> dict[str, Any]:
        """Make an event due now, as if it had never been tried. Raises a 404 if there is none."""

        async def write(session: AsyncSession) -> dict[str, Any]:
            found = await session.scalar(
                select(Event)
                .join(Job, Job.job_id == Event.job_id)
                .where(Event.event_id == event_id, Job.tenant_id == tenant_id)
            )
            if found is None:
                raise errors.not_found(f"no event {event_id}", "event_id")
            found.state, found.attempts, found.due_at, found.last_error = "pending", 0, now(), None
            return _shown(found)

        return await self.database.write(write)


def _untried() -> ColumnElement[bool]:
    return and_(Event.attempts == 0, Event.due_at < now() - datetime.timedelta(seconds=UNTRIED_S))


def _shown(event: Event) -> dict[str, Any]:
    return {
        **event.payload,
        "state": event.state,
        "attempts": event.attempts,
        "last_error": event.last_error,
    }
