"""The records of jobs: creating and deleting them, and recording their finished adverts."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from serve.errors import DureError
from serve.services.adverts.stages import VariantKey, busy, find
from serve.store.database import Conflict, Database, changes
from serve.store.pending import keep
from serve.store.tables import AdCopy, IdempotencyKey, ImageAsset, Job, JobInput, Overlay, Variant


@dataclass(frozen=True)
class Image:
    """An image file, at `path` below the assets folder."""

    image_asset_id: uuid.UUID
    path: str
    media_type: str
    width: int
    height: int
    size_bytes: int


@dataclass(frozen=True)
class NewJob:
    """A job to create: what the client sent, and the ids that the route has assigned."""

    tenant_id: str
    job_id: uuid.UUID
    job_variants_id: uuid.UUID
    image: Image
    desc_eng: str | None = None
    ad_copy_eng: str | None = None
    idempotency_key: str | None = None
    fingerprint: str = ""
    """Hash of what was sent, to tell a repeat from another request with the same idempotency key."""


class Jobs:
    """The jobs in a database. Its methods raise DureError."""

    def __init__(self, database: Database) -> None:
        self.database = database

    async def answered(self, new: NewJob) -> dict[str, Any] | None:
        """The answer that was given to an earlier request with this idempotency key; None if the key is new or missing.

        Raises a 422 if that was another request.
        """

        async def read(session: AsyncSession) -> dict[str, Any] | None:
            return await _answered_before(session, new)

        return await self.database.read(read) if new.idempotency_key is not None else None

    async def create(self, new: NewJob) -> dict[str, Any]:
        """Create the job; returns the answer for the client. A known idempotency key gets its earlier answer.

        Idempotent. Raises a 422 if the key came with another request, and a 409 if its image was deleted meanwhile.
        """
        answer = {
            "job_id": str(new.job_id),
            "job_variants_id": str(new.job_variants_id),
            "image_asset_id": str(new.image.image_asset_id),
        }

        async def write(session: AsyncSession) -> dict[str, Any]:
            if (known := await _answered_before(session, new)) is not None:
                return known
            if await session.get(Job, new.job_id) is None:  # else an earlier attempt was committed
                await _add(session, new, answer)
            await keep(session, new.image.path)
            return answer

        return await self.database.write(write)

    async def check_overlay(self, key: VariantKey) -> None:
        """Raises a 404 if there is no such variant, and a 409 while it is running."""

        async def read(session: AsyncSession) -> None:
            if (variant := await find(session, key)).status == "running":
                raise busy(variant)

        await self.database.read(read)

    async def record_overlay(
        self, key: VariantKey, overlay_id: uuid.UUID, image: Image | None, layout: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Record the finished advert: its image, the layout it was rendered from, or both; returns its ids. Idempotent.

        Raises as `check_overlay` does.
        """

        async def write(session: AsyncSession) -> dict[str, Any]:
            variant = await find(session, key)
            if await session.get(Overlay, overlay_id) is None:
                if variant.status == "running":
                    raise busy(variant)
                if image is not None:
                    session.add(_asset(key.job_id, image))
                session.add(Overlay(overlay_id=overlay_id, job_variants_id=key.job_variants_id, layout=layout or {}))
                await session.flush()
                changed = await changes(
                    session,
                    update(Variant)
                    .where(Variant.job_variants_id == key.job_variants_id, Variant.revision == variant.revision)
                    .values(
                        step="overlay",
                        status="done",
                        reason=None,
                        revision=variant.revision + 1,
                        overlaid_img_asset_id=image and image.image_asset_id,
                    ),
                )
                if not changed:
                    raise Conflict
            if image is not None:
                await keep(session, image.path)
            return {
                "job_id": str(key.job_id),
                "job_variants_id": str(key.job_variants_id),
                "overlay_id": str(overlay_id),
                "overlaid_img_asset_id": image and str(image.image_asset_id),
            }

        return await self.database.write(write)

    async def of_tenant(
        self, tenant_id: str, job_id: uuid.UUID | None, before: datetime.datetime, limit: int
    ) -> list[uuid.UUID]:
        """Up to `limit` of a tenant's jobs created before a time, oldest first. With `job_id`, that job alone."""

        async def read(session: AsyncSession) -> list[uuid.UUID]:
            query = select(Job.job_id).where(Job.tenant_id == tenant_id, Job.created_at < before)
            if job_id is not None:
                query = query.where(Job.job_id == job_id)
            return list(await session.scalars(query.order_by(Job.created_at).limit(limit)))

        return await self.database.read(read)

    async def forget(self, jobs: Sequence[uuid.UUID]) -> None:
        """Delete the records of these jobs and of all that belongs to them. The files are the caller's to delete."""

        async def write(session: AsyncSession) -> None:
            await session.execute(delete(JobInput).where(JobInput.job_id.in_(jobs)))
            await session.execute(delete(Variant).where(Variant.job_id.in_(jobs)))
            await session.execute(delete(Job).where(Job.job_id.in_(jobs)))

        await self.database.write(write, frees=True)

    async def tenants(self, before: datetime.datetime) -> list[str]:
        """Tenants with jobs created before a time."""

        async def read(session: AsyncSession) -> list[str]:
            return list(await session.scalars(select(Job.tenant_id).where(Job.created_at < before).distinct()))

        return await self.database.read(read)


async def _answered_before(session: AsyncSession, new: NewJob) -> dict[str, Any] | None:
    """As `Jobs.answered`, within a transaction."""
    if new.idempotency_key is None:
        return None
    known = await session.get(IdempotencyKey, (new.tenant_id, new.idempotency_key))
    if known is not None and known.fingerprint != new.fingerprint:
        raise DureError(
            422, "idempotency_key_reused", "this Idempotency-Key was used with another request", "Idempotency-Key"
        )
    return None if known is None else known.answer


async def _add(session: AsyncSession, new: NewJob, answer: dict[str, Any]) -> None:
    """Add all rows of a new job. Raises Conflict if another request with its idempotency key came first."""
    session.add(Job(job_id=new.job_id, tenant_id=new.tenant_id))
    await session.flush()
    session.add(_asset(new.job_id, new.image))
    await session.flush()
    session.add(JobInput(job_id=new.job_id, img_asset_id=new.image.image_asset_id, desc_eng=new.desc_eng))
    session.add(
        Variant(
            job_variants_id=new.job_variants_id,
            job_id=new.job_id,
            img_asset_id=new.image.image_asset_id,
            step="img_gen",
            status="done",
        )
    )
    if new.ad_copy_eng is not None:
        session.add(
            AdCopy(job_id=new.job_id, generation_stage="ad_copy_eng", status="done", ad_copy_eng=new.ad_copy_eng)
        )
    if new.idempotency_key is not None:
        session.add(
            IdempotencyKey(
                tenant_id=new.tenant_id,
                key=new.idempotency_key,
                job_id=new.job_id,
                fingerprint=new.fingerprint,
                answer=answer,
            )
        )
    try:
        await session.flush()
    except IntegrityError as error:
        if new.idempotency_key is None:
            raise
        raise Conflict from error  # another request committed this key at the same moment


def _asset(job_id: uuid.UUID, image: Image) -> ImageAsset:
    return ImageAsset(
        image_asset_id=image.image_asset_id,
        job_id=job_id,
        path=image.path,
        media_type=image.media_type,
        width=image.width,
        height=image.height,
        size_bytes=image.size_bytes,
    )
