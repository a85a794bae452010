"""Image files that are not recorded yet.

A file is entered here before it is written, and struck out in the transaction that records it. An entry that is left
belongs to an upload that was cut short, whose file can thus be found and deleted. Once an entry is dropped, its file
can't be recorded any more.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Sequence

from sqlalchemy import ColumnElement, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from serve import errors
from serve.store.database import Conflict, Database, changes
from serve.store.tables import ImageAsset, PendingFile

WRITING, DROPPED = "writing", "dropped"


class PendingFiles:
    def __init__(self, database: Database) -> None:
        self.database = database

    async def expect(self, tenant_id: str, job_id: uuid.UUID, path: str) -> None:
        """Enter a file that is about to be written, unless it is on record. Idempotent."""

        async def write(session: AsyncSession) -> None:
            # In this order, as a file that has just been struck out is on record.
            known = await session.get(PendingFile, path)
            if known is None and not await session.scalar(select(ImageAsset.path).where(ImageAsset.path == path)):
                session.add(PendingFile(path=path, tenant_id=tenant_id, job_id=job_id, state=WRITING))
                try:
                    await session.flush()
                except IntegrityError as error:
                    raise Conflict from error  # a repeat of the same call, at the same moment

        await self.database.write(write)

    async def drop(self, path: str) -> bool:
        """Drop a file's entry. True if the file is not on record, and now never will be."""

        async def write(session: AsyncSession) -> bool:
            dropped = update(PendingFile).where(PendingFile.path == path).values(state=DROPPED)
            return await changes(session, dropped)

        return await self.database.write(write)

    async def drop_of(self, tenant_id: str, job_id: uuid.UUID | None, after: str, limit: int) -> list[str]:
        """Drop up to `limit` pending files of a tenant, or of one of its jobs, by path; returns their paths."""
        own = [PendingFile.tenant_id == tenant_id, PendingFile.path > after]
        return await self._drop(own + ([PendingFile.job_id == job_id] if job_id else []), limit)

    async def drop_old(self, before: datetime.datetime, limit: int) -> list[str]:
        """Drop up to `limit` files that have been pending since before a time; returns their paths."""
        return await self._drop([PendingFile.created_at < before, PendingFile.state == WRITING], limit)

    async def dropped(self, before: datetime.datetime, limit: int) -> list[str]:
        """Up to `limit` dropped files that were entered before a time."""

        async def read(session: AsyncSession) -> list[str]:
            old = [PendingFile.created_at < before, PendingFile.state == DROPPED]
            return list(await session.scalars(select(PendingFile.path).where(*old).limit(limit)))

        return await self.database.read(read)

    async def strike_out(self, path: str) -> None:
        """Delete the entry of a file that is gone, once the call that was to record it has ended."""

        async def write(session: AsyncSession) -> None:
            await session.execute(delete(PendingFile).where(PendingFile.path == path))

        await self.database.write(write)

    async def forget(self, paths: Sequence[str]) -> None:
        """Delete those of these entries that were dropped."""

        async def write(session: AsyncSession) -> None:
            await session.execute(delete(PendingFile).where(PendingFile.path.in_(paths), PendingFile.state == DROPPED))

        await self.database.write(write)

    async def _drop(self, which: list[ColumnElement[bool]], limit: int) -> list[str]:
        async def read(session: AsyncSession) -> list[str]:
            found = select(PendingFile.path).where(*which).order_by(PendingFile.path).limit(limit)
            return list(await session.scalars(found))

        async def write(session: AsyncSession) -> list[str]:
            still = PendingFile.path.in_(paths)
            await session.execute(update(PendingFile).where(still).values(state=DROPPED))
            return list(await session.scalars(select(PendingFile.path).where(still).order_by(PendingFile.path)))

        paths = await self.database.read(read)
        # Entries take next to no room, but the files, which do, can be deleted only once their entries are dropped.
        return await self.database.write(write, frees=True) if paths else []


async def keep(session: AsyncSession, path: str) -> None:
    """Strike out a file that this transaction records. Raises a 409 if it was dropped meanwhile."""
    kept = delete(PendingFile).where(PendingFile.path == path, PendingFile.state == WRITING)
    await session.execute(kept)
    if await session.get(PendingFile, path) is not None:
        raise errors.conflict("the upload was deleted before it was recorded; send the request again", None, 1)
