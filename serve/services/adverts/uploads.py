"""Image files that are uploaded: written down, written, and put on record, in this order.

So whatever is cut short in between, by a full disk, a client that leaves or a process that dies, is known, and swept.
Files that nobody knows of are left where they are: a folder that was given to another database would be emptied
otherwise. Those in a job's folder go with the job.
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
"""An upload that has not come to its end by then has died: each of its steps is given up after less than a minute."""
FORGOTTEN_S = 3600.0
"""A write that hung may still have been carried out after its file was deleted, so that is done once more, then."""
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
        """A file could not be written."""
        self.clearing: set[asyncio.Task[None]] = set()

    async def kept(self, file: NewFile, record: Callable[[], Awaitable[Result]]) -> Result:
        """Write a file, and what `record` returns, which puts it on record. Raises DureError.

        Where that does not come about, nothing is left of the file; where the caller is cancelled, soon after.
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
        """The file that was kept is not needed: it never comes to be on record, and goes soon."""
        self._clear(path, None, refused=True)

    async def drop(self, tenant_id: str, job_id: uuid.UUID | None) -> None:
        """Whatever a tenant, or one of its jobs, is uploading goes, and is refused in the end."""
        last = ""
        while paths := await self.pending.drop_of(tenant_id, job_id, last, AT_ONCE):
            for last in paths:
                await self.assets.discard(last)

    async def sweep(self, at: datetime.datetime | None = None) -> int:
        """Delete the files of uploads that have died by now, or by `at`; how many there were."""
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
        """Delete a file unless it is on record, which it is not where that was `refused`.

        Else its entry stays, dropped, as the call may have been made again. What fails here is left to the sweep.
        """
        try:
            hangs = writing is not None and await _hangs(writing)
            if refused or await self.pending.drop(path):
                await self.assets.discard(path)
            if refused and not hangs:
                await self.pending.strike_out(path)
        except Exception as error:
            logger.warning("the file %r is left to be swept: %r", path, error)


async def _hangs(writing: asyncio.Future[None]) -> bool:
    """Wait until a file has been written, or that was given up. Might it still be written?"""
    [problem] = await asyncio.gather(writing, return_exceptions=True)
    return problem is not None and isinstance(problem.__cause__, TimeoutError)
