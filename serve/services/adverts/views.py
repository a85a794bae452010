"""What a tenant sees of the record: jobs, traces, and the progress of a job."""

from __future__ import annotations

import asyncio
import base64
import datetime
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from serve import errors
from serve.store.database import Database
from serve.store.tables import AdCopy, Event, ImageAsset, Job, JobInput, Trace, Variant

SHORTEST_POLL_S, LONGEST_POLL_S = 0.2, 1.0
"""Pause between reads of a followed job; it is shorter while the job advances."""


@dataclass(frozen=True)
class Progress:
    """What a follower of a job sees at one moment."""

    variants: list[dict[str, Any]]
    events: list[dict[str, Any]]
    """The oldest first."""


class Views:
    def __init__(self, database: Database) -> None:
        self.database = database

    async def job(self, tenant_id: str, job_id: uuid.UUID) -> dict[str, Any]:
        """A job with its variants and their verdicts. Raises a 404 if there is none."""

        async def read(session: AsyncSession) -> dict[str, Any]:
            job = await _job(session, tenant_id, job_id)
            given = await session.scalar(select(JobInput).where(JobInput.job_id == job_id).limit(1))
            copy = await session.scalar(
                select(AdCopy.ad_copy_eng)
                .where(AdCopy.job_id == job_id, AdCopy.generation_stage == "ad_copy_eng", AdCopy.status == "done")
                .order_by(AdCopy.created_at.desc())
                .limit(1)
            )
            paths = dict(
                (
                    await session.execute(
                        select(ImageAsset.image_asset_id, ImageAsset.path).where(ImageAsset.job_id == job_id)
                    )
                )
                .tuples()
                .all()
            )
            traces = (
                await session.scalars(select(Trace).where(Trace.job_id == job_id).order_by(Trace.created_at))
            ).all()
            variants = await session.scalars(
                select(Variant).where(Variant.job_id == job_id).order_by(Variant.created_at)
            )
            return {
                "job_id": str(job_id),
                "tenant_id": tenant_id,
                "created_at": job.created_at.isoformat(),
                "desc_eng": given and given.desc_eng,
                "ad_copy_eng": copy,
                "variants": [_variant(variant, paths, traces) for variant in variants],
            }

        return await self.database.read(read)

    async def traces(self, tenant_id: str, job_id: uuid.UUID | None, after: str | None, limit: int) -> dict[str, Any]:
        """Up to `limit` traces, the oldest first, and the cursor of the next page. Raises a 404 and a 400."""

        async def read(session: AsyncSession) -> dict[str, Any]:
            query = select(Trace).join(Job, Job.job_id == Trace.job_id).where(Job.tenant_id == tenant_id)
            if job_id is not None:
                await _job(session, tenant_id, job_id)
                query = query.where(Trace.job_id == job_id)
            if after is not None:
                query = query.where(tuple_(Trace.created_at, Trace.vlm_trace_id) > tuple_(*_place(after)))
            page = list(await session.scalars(query.order_by(Trace.created_at, Trace.vlm_trace_id).limit(limit + 1)))
            next_cursor = _cursor(page[limit - 1]) if len(page) > limit else None
            return {"traces": [_trace(trace) for trace in page[:limit]], "next": next_cursor}

        return await self.database.read(read)

    async def asset_path(self, tenant_id: str, path: str) -> str | None:
        """The path, if it is that of one of the tenant's images."""

        async def read(session: AsyncSession) -> str | None:
            return await session.scalar(
                select(ImageAsset.path)
                .join(Job, Job.job_id == ImageAsset.job_id)
                .where(ImageAsset.path == path, Job.tenant_id == tenant_id)
            )

        return await self.database.read(read)

    async def follow(self, tenant_id: str, job_id: uuid.UUID) -> AsyncIterator[Progress]:
        """A job's progress, now and each time it advances. Raises a 404, also once the job is deleted."""
        before: Progress | None = None
        pause_s = SHORTEST_POLL_S
        while True:
            progress = await self.progress(tenant_id, job_id)
            if progress != before:
                yield progress
                before, pause_s = progress, SHORTEST_POLL_S
            await asyncio.sleep(pause_s)
            pause_s = min(1.5 * pause_s, LONGEST_POLL_S)

    async def progress(self, tenant_id: str, job_id: uuid.UUID) -> Progress:
        """A job's progress now. Raises a 404 if there is no such job."""

        async def read(session: AsyncSession) -> Progress:
            await _job(session, tenant_id, job_id)
            variants = await session.scalars(
                select(Variant).where(Variant.job_id == job_id).order_by(Variant.created_at)
            )
            events = await session.scalars(select(Event).where(Event.job_id == job_id).order_by(Event.created_at))
            return Progress([_state(variant) for variant in variants], [event.payload for event in events])

        return await self.database.read(read)


async def _job(session: AsyncSession, tenant_id: str, job_id: uuid.UUID) -> Job:
    job = await session.scalar(select(Job).where(Job.job_id == job_id, Job.tenant_id == tenant_id))
    if job is None:
        raise errors.not_found(f"no job {job_id}", "job_id")
    return job


def _state(variant: Variant) -> dict[str, Any]:
    return {
        "job_variants_id": str(variant.job_variants_id),
        "step": variant.step,
        "status": variant.status,
        "reason": variant.reason,
        "progress": variant.progress,
    }


def _variant(variant: Variant, paths: dict[uuid.UUID, str], traces: Sequence[Trace]) -> dict[str, Any]:
    own = [trace for trace in traces if trace.job_variants_id == variant.job_variants_id]
    newest = {trace.operation_type: trace.response for trace in own}
    if variant.step != "vlm_judge":
        newest.pop("judge", None)  # it is the verdict on an earlier finished advert
    verdicts = {name: response for name, response in newest.items() if response and "error" not in response}
    overlaid = variant.overlaid_img_asset_id
    return {
        **_state(variant),
        "img_asset_id": str(variant.img_asset_id),
        "img_path": paths.get(variant.img_asset_id),
        "overlaid_img_asset_id": overlaid and str(overlaid),
        "overlaid_img_path": overlaid and paths.get(overlaid),
        "updated_at": variant.updated_at.isoformat(),
        "verdicts": {operation: verdicts.get(operation) for operation in ("analyze", "judge")},
        "steps": [
            {
                "operation_type": trace.operation_type,
                "status": "running" if trace.response is None else "failed" if "error" in trace.response else "done",
                "vlm_trace_id": str(trace.vlm_trace_id),
                "latency_ms": trace.latency_ms,
                "created_at": trace.created_at.isoformat(),
            }
            for trace in own
        ],
    }


def _trace(trace: Trace) -> dict[str, Any]:
    return {
        "vlm_trace_id": str(trace.vlm_trace_id),
        "job_id": str(trace.job_id),
        "job_variants_id": str(trace.job_variants_id),
        "provider": trace.provider,
        "operation_type": trace.operation_type,
        "request": trace.request,
        "response": trace.response,
        "latency_ms": trace.latency_ms,
        "created_at": trace.created_at.isoformat(),
        "updated_at": trace.updated_at.isoformat(),
    }


def _cursor(trace: Trace) -> str:
    place = json.dumps([trace.created_at.isoformat(), str(trace.vlm_trace_id)])
    return base64.urlsafe_b64encode(place.encode()).decode()


def _place(cursor: str) -> tuple[datetime.datetime, uuid.UUID]:
    try:
        created_at, trace = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        return datetime.datetime.fromisoformat(created_at).astimezone(datetime.UTC), uuid.UUID(trace)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise errors.invalid("`after` is not the `next` of an earlier answer", "after") from error
