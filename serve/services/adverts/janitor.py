"""Periodic work: ends leases that have run out, sweeps uploads that were cut short, and deletes old jobs."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import time
import uuid
from collections.abc import Callable

from serve.config.settings import Settings
from serve.errors import DureError
from serve.services.adverts.jobs import Jobs
from serve.services.adverts.stages import Stages
from serve.services.adverts.uploads import Uploads
from serve.store.database import DiskFull
from serve.store.outbox import Outbox
from serve.store.tables import now
from serve.waiting import within

logger = logging.getLogger("ray.serve")

TIDY_EVERY_S = 300.0
SHORTEST_POLL_S, LONGEST_POLL_S = 0.2, 5.0
"""Pause between rounds; it is shorter after a file could not be written, so that this is reported soon."""
AT_ONCE = 100


class Janitor:
    def __init__(
        self,
        stages: Stages,
        jobs: Jobs,
        outbox: Outbox,
        uploads: Uploads,
        settings: Settings,
        report: Callable[[str], object],
    ) -> None:
        """`report` gets what keeps files from being written, each time that is checked; empty if nothing does."""
        self.stages, self.jobs, self.outbox, self.uploads = stages, jobs, outbox, uploads
        self.assets = uploads.assets
        self.settings = settings
        self.report = report
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work; needs a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def delete(self, tenant_id: str, job_id: uuid.UUID | None = None) -> int:
        """Delete a tenant's present jobs, or one of them, and their uploads; returns how many jobs."""
        with contextlib.suppress(DiskFull):  # deleting jobs may make room
            await self.uploads.drop(tenant_id, job_id)
        count = await self._delete_jobs(tenant_id, job_id, now())
        await self.uploads.drop(tenant_id, job_id)
        return count

    async def _delete_jobs(self, tenant_id: str, job_id: uuid.UUID | None, before: datetime.datetime) -> int:
        """Delete files first, so that an interrupted deletion can be repeated and a full disk gets room for it.

        Files are deleted once more when the rows are gone, for those that were written in between.
        """
        count = 0
        while jobs := await self.jobs.of_tenant(tenant_id, job_id, before, AT_ONCE):
            for job in jobs:
                await self.assets.delete(str(job))
            await self.jobs.forget(jobs)
            for job in jobs:
                await self.assets.delete(str(job))
            count += len(jobs)
        return count

    async def _run(self) -> None:
        tidied_at = -TIDY_EVERY_S
        while True:
            self.uploads.troubled.clear()
            try:
                self.report(await self.assets.problem() or await self.jobs.database.problem())
                if ended := await self.stages.expire():
                    logger.warning("%d stages failed because their calls died", ended)
                if time.monotonic() - tidied_at > TIDY_EVERY_S:
                    tidied_at = time.monotonic()
                    await self._tidy()
            except DureError as error:
                logger.warning("leases, uploads and old jobs are not tidied for now: %s", error)
            except Exception:
                logger.exception("leases, uploads and old jobs are not tidied for now")
            if await within(self.uploads.troubled, min(self.stages.lease_s / 3, LONGEST_POLL_S)):
                await asyncio.sleep(SHORTEST_POLL_S)

    async def _tidy(self) -> None:
        await self.jobs.database.hold_room()
        if swept := await self.uploads.sweep():
            logger.info("deleted the files of %d uploads that were cut short", swept)
        if ended := await self.outbox.set_aside(self.settings.webhook is not None):
            logger.warning("%d events will not be delivered: there was no webhook when they happened", ended)
        await self._delete_old()

    async def _delete_old(self) -> None:
        store = self.settings.store
        periods = [days for days in (store.retention_days, *store.tenant_retention_days.values()) if days is not None]
        if not periods:
            return
        for tenant_id in await self.jobs.tenants(_ago(min(periods))):
            days = store.tenant_retention_days.get(tenant_id, store.retention_days)
            if days is not None and (count := await self._delete_jobs(tenant_id, None, _ago(days))):
                logger.info("deleted %d jobs of tenant %s that were over %g days old", count, tenant_id, days)


def _ago(days: float) -> datetime.datetime:
    return now() - datetime.timedelta(days=days)
