"""What is to be done now and then: end leases that are over, and delete what is older than its tenant wants."""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
import uuid

from serve.errors import DureError
from serve.settings import Settings
from serve.store.assets import Assets
from serve.store.jobs import Jobs
from serve.store.outbox import Outbox
from serve.store.stages import Stages
from serve.store.tables import now

logger = logging.getLogger("ray.serve")

TIDY_EVERY_S = 300.0
LONGEST_LOOK_S = 5.0
AT_ONCE = 100


class Janitor:
    def __init__(self, stages: Stages, jobs: Jobs, outbox: Outbox, assets: Assets, settings: Settings) -> None:
        self.stages, self.jobs, self.outbox, self.assets = stages, jobs, outbox, assets
        self.settings = settings
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; needs a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def delete(
        self, tenant_id: str, job_id: uuid.UUID | None = None, before: datetime.datetime | None = None
    ) -> int:
        """Delete a tenant's jobs that there are now; how many there were.

        Files go first, so that what is cut short can be begun again, and once more when the rows are gone, for those
        that came in between.
        """
        before = before or now()
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
            try:
                if ended := await self.stages.expire():
                    logger.warning("%d stages have failed: their calls died", ended)
                if time.monotonic() - tidied_at > TIDY_EVERY_S:
                    tidied_at = time.monotonic()
                    await self._tidy()
            except DureError as error:
                logger.warning("leases and old jobs wait: %s", error)
            except Exception:
                logger.exception("leases and old jobs wait")
            await asyncio.sleep(min(self.stages.lease_s / 3, LONGEST_LOOK_S))

    async def _tidy(self) -> None:
        if ended := await self.outbox.set_aside(self.settings.webhook is not None):
            logger.warning("%d events are not delivered: there was no webhook when they happened", ended)
        await self._delete_old()

    async def _delete_old(self) -> None:
        store = self.settings.store
        periods = [days for days in (store.retention_days, *store.tenant_retention_days.values()) if days is not None]
        if not periods:
            return
        for tenant_id in await self.jobs.tenants(_ago(min(periods))):
            days = store.tenant_retention_days.get(tenant_id, store.retention_days)
            if days is not None and (count := await self.delete(tenant_id, before=_ago(days))):
                logger.info("%d jobs of tenant %s were over %g days old and are deleted", count, tenant_id, days)


def _ago(days: float) -> datetime.datetime:
    return now() - datetime.timedelta(days=days)
