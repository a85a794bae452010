"""The two stages of a variant: what may start them, which call runs them, how they end.

Locking is optimistic: an update applies only to the revision that was read, so if two calls start the same stage, one
wins. The call that runs a stage holds a lease and renews it. If its process dies, the lease runs out and the stage
fails. Starting a stage also writes a trace, in the same transaction, and ending the stage completes it.
"""

from __future__ import annotations

import datetime
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from serve import errors
from serve.errors import DureError
from serve.store.database import Conflict, Database, changes
from serve.store.outbox import event_of
from serve.store.tables import AdCopy, ImageAsset, Job, JobInput, Overlay, Trace, Variant, now

PROVIDER = "llava"
EXPIRED = "the call that ran it died, so its lease ran out"
AT_ONCE = 100
"""Most expired leases ended in one transaction."""


@dataclass(frozen=True)
class Stage:
    """One of the two stages, as the database names it."""

    step: Literal["vlm_analyze", "vlm_judge"]
    operation: Literal["analyze", "judge"]
    starts_from: frozenset[tuple[str, str]]
    """Pairs of step and status that a variant may be at."""
    triggers: Literal["yolo_detect", "ocr_eval"]
    """Kind of the event that a finished stage leads to."""


VALIDATE = Stage(
    "vlm_analyze",
    "analyze",
    frozenset({("img_gen", "done"), ("vlm_analyze", "done"), ("vlm_analyze", "failed")}),
    "yolo_detect",
)
JUDGE = Stage("vlm_judge", "judge", frozenset({("overlay", "done"), ("vlm_judge", "failed")}), "ocr_eval")


@dataclass(frozen=True)
class VariantKey:
    """The ids that identify a variant to its tenant."""

    tenant_id: str
    job_id: uuid.UUID
    job_variants_id: uuid.UUID


@dataclass(frozen=True)
class Sources:
    """What a stage can work from, and the variant's revision when this was read."""

    revision: int
    desc_eng: str | None
    ad_copy_eng: str | None
    """The newest that is done."""
    image: str | None
    """Path of the variant's own image."""
    overlaid_image: str | None
    render_url: str | None
    """From the overlay's layout."""


class Stages:
    """The stages in a database. `call` is the id of the call that runs a stage, and of its trace."""

    def __init__(self, database: Database, lease_s: float, to_webhook: bool = True) -> None:
        """`to_webhook` says that a webhook is configured, so events are to be delivered."""
        self.database = database
        self.lease_s = lease_s
        self.to_webhook = to_webhook

    async def outcome(self, key: VariantKey, call: uuid.UUID) -> dict[str, Any] | None:
        """The response on record if this call has been made before; None if there is none yet.

        Raises a 404 for an unknown variant.
        """

        async def read(session: AsyncSession) -> dict[str, Any] | None:
            await find(session, key)
            trace = await session.get(Trace, call)
            return trace.response if trace else None

        return await self.database.read(read)

    async def sources(
        self, stage: Stage, key: VariantKey, call: uuid.UUID, overlay_id: uuid.UUID | None = None
    ) -> Sources:
        """What the stage can work from. Raises DureError if this call may not start it."""

        async def read(session: AsyncSession) -> Sources:
            variant = await find(session, key)
            _check(stage, variant, call)
            desc = select(JobInput.desc_eng).where(JobInput.job_id == key.job_id)
            copies = (
                select(AdCopy.ad_copy_eng)
                .where(AdCopy.job_id == key.job_id, AdCopy.generation_stage == "ad_copy_eng", AdCopy.status == "done")
                .order_by(AdCopy.created_at.desc())
            )
            overlays = select(Overlay).where(Overlay.job_variants_id == key.job_variants_id)
            if overlay_id is not None:
                overlays = overlays.where(Overlay.overlay_id == overlay_id)
            overlay = await session.scalar(overlays.order_by(Overlay.created_at.desc()).limit(1))
            if overlay is None and overlay_id is not None:
                raise errors.not_found(f"the variant has no overlay {overlay_id}", "overlay_id")
            return Sources(
                variant.revision,
                await session.scalar(desc.order_by(JobInput.created_at.desc()).limit(1)),
                await session.scalar(copies.limit(1)),
                await _path(session, variant.img_asset_id),
                await _path(session, variant.overlaid_img_asset_id),
                _render_url(overlay),
            )

        return await self.database.read(read)

    async def start(
        self, stage: Stage, key: VariantKey, call: uuid.UUID, revision: int, request: dict[str, Any]
    ) -> bool:
        """Start the stage: give this call the lease, and write its trace. Idempotent.

        Returns False if the variant has changed since `revision`. Raises DureError if the stage may not start.
        """

        async def write(session: AsyncSession) -> bool:
            variant = await find(session, key)
            _check(stage, variant, call)
            if variant.status == "running":
                return True  # an earlier attempt was committed, but its reply was lost
            if await session.get(Trace, call) is not None:
                raise lost(stage)
            if variant.revision != revision:
                return False
            changed = await changes(
                session,
                update(Variant)
                .where(Variant.job_variants_id == key.job_variants_id, Variant.revision == revision)
                .values(
                    step=stage.step,
                    status="running",
                    reason=None,
                    progress=None,
                    revision=revision + 1,
                    lease_id=call,
                    lease_until=self._until(),
                ),
            )
            if not changed:
                raise Conflict
            session.add(
                Trace(
                    vlm_trace_id=call,
                    job_id=key.job_id,
                    job_variants_id=key.job_variants_id,
                    provider=PROVIDER,
                    operation_type=stage.operation,
                    request=request,
                )
            )
            return True

        return await self.database.write(write)

    async def renew(self, call: uuid.UUID, progress: dict[str, Any] | None) -> bool:
        """Renew the lease and record the call's progress. Returns False if the lease has been lost."""

        async def write(session: AsyncSession) -> bool:
            held = update(Variant).where(Variant.lease_id == call, Variant.status == "running")
            return await changes(session, held.values(lease_until=self._until(), progress=progress))

        return await self.database.write(write)

    async def end(
        self,
        stage: Stage,
        key: VariantKey,
        call: uuid.UUID,
        response: dict[str, Any],
        latency_ms: int,
        reason: str | None,
    ) -> bool:
        """Record the outcome and, unless the stage failed, the event it leads to. Idempotent.

        `reason` says why the stage failed, None that it succeeded. Returns False if the lease had been lost: then the
        record says that instead.
        """

        async def write(session: AsyncSession) -> bool:
            changed = await changes(
                session,
                update(Variant)
                .where(Variant.lease_id == call, Variant.status == "running")
                .values(_ended(reason) | {"revision": Variant.revision + 1}),
            )
            if not changed:
                trace = await session.get(Trace, call)
                return trace is not None and trace.response == response
            completed = update(Trace).where(Trace.vlm_trace_id == call)
            await session.execute(completed.values(response=response, latency_ms=latency_ms))
            if reason is None:
                ids = (key.tenant_id, key.job_id, key.job_variants_id, call)
                session.add(event_of(stage.triggers, *ids, to_webhook=self.to_webhook))
            return True

        return await self.database.write(write)

    async def expire(self) -> int:
        """End stages whose lease has run out, at most `AT_ONCE`, as failed; returns how many."""

        async def write(session: AsyncSession) -> int:
            expired = (
                select(Variant.job_variants_id, Variant.lease_id)
                .where(Variant.status == "running", Variant.lease_until < now())
                .limit(AT_ONCE)
            )
            ended = 0
            for variant, call in (await session.execute(expired)).tuples().all():
                expiry = (
                    update(Variant)
                    .where(Variant.job_variants_id == variant, Variant.lease_id == call)
                    .where(Variant.status == "running", Variant.lease_until < now())
                    .values(_ended(EXPIRED) | {"revision": Variant.revision + 1})
                )
                if not await changes(session, expiry):
                    continue
                ended += 1
                trace = await session.get_one(Trace, call)
                trace.response = failure("lease_expired", EXPIRED)
                trace.latency_ms = round(1000 * (now() - trace.created_at).total_seconds())
            return ended

        return await self.database.write(write)

    def _until(self) -> datetime.datetime:
        return now() + datetime.timedelta(seconds=self.lease_s)


def failure(kind: str, message: str) -> dict[str, Any]:
    """The response to put on record if there is no verdict."""
    return {"error": {"type": kind, "message": message}}


async def find(session: AsyncSession, key: VariantKey) -> Variant:
    """The variant. Raises a 404 if there is none, or if it is another tenant's."""
    found = await session.scalar(
        select(Variant)
        .join(Job, Job.job_id == Variant.job_id)
        .where(Variant.job_variants_id == key.job_variants_id, Variant.job_id == key.job_id)
        .where(Job.tenant_id == key.tenant_id)
    )
    if found is None:
        raise errors.not_found(f"no variant {key.job_variants_id} of job {key.job_id}", "job_variants_id")
    return found


def busy(variant: Variant) -> DureError:
    return errors.conflict(f"{variant.step} is running; wait until it is done", "job_variants_id", 2)


def lost(stage: Stage) -> DureError:
    return errors.conflict(f"this call lost its lease on {stage.step}: it was not renewed in time")


def _check(stage: Stage, variant: Variant, call: uuid.UUID) -> None:
    """Raises DureError unless the call has started the stage already, or may start it from the variant's state."""
    if variant.status == "running":
        if variant.lease_id == call:
            return
        raise busy(variant)
    if (variant.step, variant.status) not in stage.starts_from:
        allowed = ", ".join(f"{step}/{status}" for step, status in sorted(stage.starts_from))
        raise errors.invalid(
            f"the variant is at {variant.step}/{variant.status}; {stage.step} starts from {allowed}", "job_variants_id"
        )


def _ended(reason: str | None) -> dict[str, Any]:
    """Columns of a variant whose stage has ended; `reason` as in `Stages.end`."""
    status = "done" if reason is None else "failed"
    return {"status": status, "reason": reason, "progress": None, "lease_id": None, "lease_until": None}


async def _path(session: AsyncSession, image_asset_id: uuid.UUID | None) -> str | None:
    if image_asset_id is None:
        return None
    return await session.scalar(select(ImageAsset.path).where(ImageAsset.image_asset_id == image_asset_id))


def _render_url(overlay: Overlay | None) -> str | None:
    render = overlay.layout.get("render") if overlay else None
    url = render.get("url") if isinstance(render, dict) else None
    return url if isinstance(url, str) and url else None
