"""Image files whose rows are still to come.

A file is written down here before it is written, and struck out in the transaction that puts it on record. What is left
here was cut short in between, by whatever: its file can be found, and deleted. Once an entry is dropped, its file can't
come to be on record any more.
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
        """A file is about to be written; one that is on record is not pending. Safe to be called again."""

        async def write(session: AsyncSession) -> None:
            # In this order: a file that has just been struck out is on record.
            known = await session.get(PendingFile, path)
            if known is None and not await session.scalar(select(ImageAsset.path).where(ImageAsset.path == path)):
                session.add(PendingFile(path=path, tenant_id=tenant_id, job_id=job_id, state=WRITING))
                try:
                    await session.flush()
                except IntegrityError as error:
                    raise Conflict from error  # the same call, made again at the same moment

        await self.database.write(write)

    async def drop(self, path: str) -> bool:
        """Whether the file is not on record, and now never will be."""

        async def write(session: AsyncSession) -> bool:
            dropped = update(PendingFile).where(PendingFile.path == path).values(state=DROPPED)
            return await changes(session, dropped)

        return await self.database.write(write)

    async def drop_of(self, tenant_id: str, job_id: uuid.UUID | None, after: str, limit: int) -> list[str]:
        """Drop what a tenant, or one of its jobs, has pending: at most so many, by path; the paths."""
        own = [PendingFile.tenant_id == tenant_id, PendingFile.path > after]
        return await self._drop(own + ([PendingFile.job_id == job_id] if job_id else []), limit)

    async def drop_old(self, before: datetime.datetime, limit: int) -> list[str]:
        """Drop what has been pending since before a time: at most so many; the paths."""
        return await self._drop([PendingFile.created_at < before, PendingFile.state == WRITING], limit)

    async def dropped(self, before: datetime.datetime, limit: int) -> list[str]:
        """What has been dropped and was written down before a time: at most so many."""

        async def read(session: AsyncSession) -> list[str]:
            old = [PendingFile.created_at < before, PendingFile.state == DROPPED]
            return list(await session.scalars(select(PendingFile.path).where(*old).limit(limit)))

        return await self.database.read(read)

    async def strike_out(self, path: str) -> None:
        """The file is gone, and the call that was to put it on record is over."""

        async def write(session: AsyncSession) -> None:
            await session.execute(delete(PendingFile).where(PendingFile.path == path))

        await self.database.write(write)

    async def forget(self, paths: Sequence[str]) -> None:
        """Strike out those of these that were dropped."""

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
        # Entries take next to no room, but until they are dropped, files that do can't be deleted.
        return await self.database.write(write, frees=True) if paths else []


async def keep(session: AsyncSession, path: str) -> None:
    """The file comes on record with this transaction. Raises a 409 where it was dropped meanwhile."""
    kept = delete(PendingFile).where(PendingFile.path == path, PendingFile.state == WRITING)
    await session.execute(kept)
    if await session.get(PendingFile, path) is not None:
        raise errors.conflict("what was uploaded was deleted meanwhile; send the request again", None, 1)
