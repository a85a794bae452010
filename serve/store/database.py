"""Transactions on SQLite or PostgreSQL, repeated while the database is briefly unreachable."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, CursorResult, Update, event, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from serve import errors
from serve.errors import DureError
from serve.store.reserve import Reserve

logger = logging.getLogger("ray.serve")

Result = TypeVar("Result")

DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}
PATIENCE_S = 20.0
"""How long a transaction is retried: a database that restarts is back by then."""
LOCK_S = 5.0
"""How long SQLite waits for another process to finish writing, and PostgreSQL for a connection."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
CONNECTIONS = 8
SNAPSHOT = {"isolation_level": "REPEATABLE READ"}
"""Gives the reads of one transaction a consistent snapshot on PostgreSQL, as SQLite does."""
FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
"""SQLite's codes for errors of a full or read-only disk: https://www.sqlite.org/rescode.html."""
LOST = ("08", "57P", "40", "53", "55P03")
"""PostgreSQL's codes for a lost connection, a shutdown, a conflict, insufficient resources, and a lock:
https://www.postgresql.org/docs/current/errcodes-appendix.html."""


class Conflict(Exception):
    """Another transaction changed what this one had read; it is repeated."""


class Unavailable(DureError):
    def __init__(self) -> None:
        super().__init__(503, "store_unavailable", "the database does not answer; send the request again", None, 2)

    def __reduce__(self) -> tuple[type[Unavailable], tuple[()]]:
        return Unavailable, ()


class DiskFull(DureError):
    """The disk is full, and nothing was written."""

    def __init__(self) -> None:
        super().__init__(*errors.no_room().args)

    def __reduce__(self) -> tuple[type[DiskFull], tuple[()]]:
        return DiskFull, ()


def address(url: str, synchronous: bool = False) -> URL:
    """The URL with the driver to use. Raises ValueError for any other kind of database."""
    parsed = make_url(url)
    kind = parsed.get_backend_name()
    if kind not in DRIVERS:
        raise ValueError(f"a store is sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME, not {kind}://")
    return parsed.set(drivername="sqlite" if synchronous and kind == "sqlite" else DRIVERS[kind])


class Database:
    """Reads and writes, each in a transaction of its own.

    Raises Unavailable after `patience_s` without an answer, and DiskFull if SQLite's disk is full.
    """

    def __init__(self, url: str, patience_s: float = PATIENCE_S) -> None:
        where = address(url)
        self.patience_s = patience_s
        self.is_sqlite = where.get_backend_name() == "sqlite"
        options: dict[str, Any] = (
            {"connect_args": {"timeout": LOCK_S}, "pool_timeout": LOCK_S}
            if self.is_sqlite
            else {
                "connect_args": {"connect_timeout": int(LOCK_S)},
                "pool_size": CONNECTIONS,
                "max_overflow": 0,
                "pool_timeout": LOCK_S,
                "pool_pre_ping": True,
            }
        )
        self.engine: AsyncEngine = create_async_engine(where, hide_parameters=True, **options)
        self.reserve: Reserve | None = None
        """Room held on SQLite's disk; None on PostgreSQL."""
        if self.is_sqlite:
            if where.database:
                Path(where.database).parent.mkdir(parents=True, exist_ok=True)
                self.reserve = Reserve(Path(where.database))
            event.listen(self.engine.sync_engine, "connect", prepare)
            event.listen(self.engine.sync_engine, "begin", begin)

    async def read(self, work: Callable[[AsyncSession], Awaitable[Result]]) -> Result:
        return await self._with_retries(work, writes=False)

    async def write(self, work: Callable[[AsyncSession], Awaitable[Result]], frees: bool = False) -> Result:
        """Run `work` and commit; returns what it returns. It is repeated after a Conflict, or if the database is away.

        `frees`: it deletes, so on a full disk it may use the room that is held for deletions.
        """
        try:
            return await self._with_retries(work, writes=True)
        except DiskFull:
            if not frees or self.reserve is None:
                raise
        await asyncio.to_thread(self.reserve.give)
        return await self._with_retries(work, writes=True)

    async def hold_room(self) -> None:
        """Hold room for deletions, on SQLite."""
        if self.reserve:
            await asyncio.to_thread(self.reserve.take)

    async def problem(self) -> str:
        """Why nothing can be written, in a few words; empty if it can, or if only a write would tell."""
        if self.reserve is None:
            return ""
        is_full = await asyncio.to_thread(self.reserve.is_full)
        return f"the record can't be written: {os.strerror(errno.ENOSPC)}" if is_full else ""

    async def close(self) -> None:
        await self.engine.dispose()

    async def _with_retries(self, work: Callable[[AsyncSession], Awaitable[Result]], writes: bool) -> Result:
        deadline: float | None = None
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await self._once(work, writes)
            except (Conflict, DBAPIError, PoolTimeout, OSError) as error:
                if _is_full(error):
                    logger.error("the record can't be written: %s", str(error).partition("\n")[0])
                    raise DiskFull from error
                if not _is_transient(error):
                    raise
                deadline = deadline or time.monotonic() + self.patience_s  # patience begins with the first failure
                if time.monotonic() + pause_s > deadline:
                    logger.error("the database does not answer: %s", error)
                    raise Unavailable from error
                logger.warning("repeating a transaction: %s", str(error).partition("\n")[0])
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _once(self, work: Callable[[AsyncSession], Awaitable[Result]], writes: bool) -> Result:
        async with AsyncSession(self.engine, expire_on_commit=False) as session:
            await session.connection(execution_options={"writes": writes} if self.is_sqlite or writes else SNAPSHOT)
            result = await work(session)
            if writes:
                await session.commit()
            return result


async def changes(session: AsyncSession, statement: Update) -> bool:
    """Whether the statement changed any row."""
    result = await session.execute(statement)
    assert isinstance(result, CursorResult)
    return bool(result.rowcount)


def _is_full(error: BaseException) -> bool:
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", 0)
    return code & 0xFF in FULL  # the rest of an extended code says where the error arose


def _is_transient(error: BaseException) -> bool:
    """Whether a retry may succeed."""
    if not isinstance(error, DBAPIError):
        return True
    if error.connection_invalidated or isinstance(error, InterfaceError):
        return True
    code = getattr(error.orig, "sqlstate", None)
    if code is not None:
        return str(code).startswith(LOST)
    if isinstance(error.orig, sqlite3.Error):
        return "locked" in str(error.orig) or "busy" in str(error.orig)
    return isinstance(error, OperationalError)  # psycopg without a connection, so without a code


def prepare(connection: Any, _: Any) -> None:
    """Set up a new connection to SQLite."""
    connection.isolation_level = None  # `begin` starts transactions; sqlite3 would guess when to
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def begin(connection: Connection) -> None:
    """Begin a transaction on SQLite; with the execution option `writes`, it holds the lock from the start."""
    # A transaction that reads first and then finds the lock taken fails at once; one that asks for it first waits.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")
