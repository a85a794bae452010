"""Uploaded image files: noted as pending, then written, then recorded, in this order.

So an upload that is cut short, by a full disk, a client that leaves or a process that dies, is known and gets swept.
Unknown files are left where they are; otherwise a folder that was given to another database would be emptied. Files in
a job's folder go with the job.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from serve.errors import FILES, DureError
from serve.store.assets import Assets
from serve.store.database import Database, Unavailable
from serve.store.pending import PendingFiles
from serve.store.tables import now

logger = logging.getLogger("ray.serve")

Result = TypeVar("Result")

GIVEN_UP_S = 600.0
"""An upload that has not ended by then has died, as each of its steps is given up after less than a minute."""
FORGOTTEN_S = 3600.0
"""The file is deleted once more after this time, as a write that hung may still have been carried out."""
AT_ONCE = 100


@dataclass(frozen=True)
class NewFile:
    tenant_id: str
    job_id: uuid.UUID
    path: str
    content: bytes = field(repr=False)


class Uploads:
    def __init__(self, database: Database, assets: Assets) -> None:
        self.pending = PendingFiles(database)
        self.assets = assets
        self.troubled = asyncio.Event()
        """Set when a file could not be written."""
        self.clearing: set[asyncio.Task[None]] = set()

    async def kept(self, file: NewFile, record: Callable[[], Awaitable[Result]]) -> Result:
        """Write a file and call `record`, which records it; returns what `record` returns. Raises DureError.

        If this fails, nothing is left of the file; if the caller is cancelled, the file goes soon after.
        """
        try:
            await self.pending.expect(file.tenant_id, file.job_id, file.path)
            return await self._kept(file, record)
        except DureError as error:
            if error.kind == FILES:
                self.troubled.set()
            raise

    async def _kept(self, file: NewFile, record: Callable[[], Awaitable[Result]]) -> Result:
        writing = asyncio.ensure_future(self.assets.write(file.path, file.content))
        try:
            await asyncio.shield(writing)
            return await record()
        except asyncio.CancelledError:
            self._clear(file.path, writing, refused=False)
            raise
        except Exception as error:
            refused = isinstance(error, DureError) and not isinstance(error, Unavailable)
            await asyncio.shield(self._clear(file.path, writing, refused))
            raise

    def take_back(self, path: str) -> None:
        """The file is not needed: it is never recorded, and goes soon."""
        self._clear(path, None, refused=True)

    async def drop(self, tenant_id: str, job_id: uuid.UUID | None) -> None:
        """Drop all that a tenant, or one of its jobs, is uploading; these uploads end with an error."""
        last = ""
        while paths := await self.pending.drop_of(tenant_id, job_id, last, AT_ONCE):
            for last in paths:
                await self.assets.discard(last)

    async def sweep(self, at: datetime.datetime | None = None) -> int:
        """Delete the files of uploads that have died by now, or by `at`; returns how many."""
        at = at or now()
        swept = 0
        while paths := await self.pending.drop_old(at - datetime.timedelta(seconds=GIVEN_UP_S), AT_ONCE):
            for path in paths:
                await self.assets.discard(path)
            swept += len(paths)
        while paths := await self.pending.dropped(at - datetime.timedelta(seconds=FORGOTTEN_S), AT_ONCE):
            for path in paths:
                await self.assets.discard(path)
            await self.pending.forget(paths)
        return swept

    def _clear(self, path: str, writing: asyncio.Future[None] | None, refused: bool) -> asyncio.Task[None]:
        clearing = asyncio.get_running_loop().create_task(self._cleared(path, writing, refused))
        self.clearing.add(clearing)
        clearing.add_done_callback(self.clearing.discard)
        return clearing

    async def _cleared(self, path: str, writing: asyncio.Future[None] | None, refused: bool) -> None:
        """Delete a file unless it has been recorded; `refused` says that it certainly has not.

        Without `refused` its entry stays, as dropped, since the call may have been repeated. The sweep retries what
        fails here.
        """
        try:
            hangs = writing is not None and await _hangs(writing)
            if refused or await self.pending.drop(path):
                await self.assets.discard(path)
            if refused and not hangs:
                await self.pending.strike_out(path)
        except Exception as error:
            logger.warning("the file %r is left to the sweep: %r", path, error)


async def _hangs(writing: asyncio.Future[None]) -> bool:
    """Wait until a write ends or is given up. Returns whether the file may still be written after that."""
    [problem] = await asyncio.gather(writing, return_exceptions=True)
    return problem is not None and isinstance(problem.__cause__, TimeoutError)
