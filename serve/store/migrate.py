"""Brings a database to the tables that this version needs: `dure migrate`.

Each migration only adds, so the version before it keeps running while it is applied and afterwards.
"""

from __future__ import annotations

import time
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect
from sqlalchemy.exc import SQLAlchemyError

from serve.store.database import address
from serve.store.reserve import Reserve

FOLDER = Path(__file__).with_name("migrations")


PAUSE_S = 0.5


class SchemaError(Exception):
    """A database that can't be used as it is. The message says what to do."""


class NoDatabase(SchemaError):
    """A database that does not answer, or not as it should."""


def migrate(url: str, revision: str = "head") -> tuple[str | None, str | None]:
    """Apply missing migrations; returns the revisions before and after.

    Raises SchemaError if the database can't be used. A database that a later version has migrated is left as it is.
    """
    where = address(url, synchronous=True)
    if where.get_backend_name() == "sqlite" and where.database:
        Path(where.database).parent.mkdir(parents=True, exist_ok=True)
    before = present(url)
    if before is None or before in _known(url):
        try:
            command.upgrade(_config(url), revision)
        except SQLAlchemyError as error:
            raise _unusable(url, error) from error
    return before, present(url)


def make_ready(url: str, patience_s: float = 0) -> None:
    """Migrate a SQLite file, which is this server's own; `check` any other database, which may not be up yet.

    Opening a file takes room too. On a full disk, that is the room held for deletions.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            if address(url).get_backend_name() == "sqlite":
                migrate(url)
            else:
                check(url)
            return
        except NoDatabase:
            if _release_room(url):
                continue
            if time.monotonic() > deadline:
                raise
            time.sleep(PAUSE_S)


def check(url: str) -> None:
    """Raises SchemaError if the database lacks a migration or can't be used.

    A database that a later version has migrated is fine, as migrations only add.
    """
    revision, newest = present(url), ScriptDirectory.from_config(_config(url)).get_current_head()
    if revision != newest and (revision is None or revision in _known(url)):
        raise SchemaError(f"the database {_shown(url)} is at revision {revision}, not {newest}: run `dure migrate`")


def present(url: str) -> str | None:
    """The revision that the database is at; None for an empty one."""
    engine = create_engine(address(url, synchronous=True))
    try:
        with engine.connect() as connection:
            if "alembic_version" not in inspect(connection).get_table_names():
                return None
            return MigrationContext.configure(connection).get_current_revision()
    except SQLAlchemyError as error:
        raise _unusable(url, error) from error
    finally:
        engine.dispose()


def _release_room(url: str) -> bool:
    """Free the room held on a SQLite file's disk. Returns whether there was any."""
    where = address(url)
    if where.get_backend_name() != "sqlite" or not where.database:
        return False
    return Reserve(Path(where.database)).release()


def _known(url: str) -> set[str]:
    return {script.revision for script in ScriptDirectory.from_config(_config(url)).walk_revisions()}


def _config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    config.attributes["url"] = address(url, synchronous=True)
    return config


def _unusable(url: str, error: SQLAlchemyError) -> NoDatabase:
    return NoDatabase(f"the database {_shown(url)} can't be used: {str(error).partition(chr(10))[0]}")


def _shown(url: str) -> str:
    return address(url).render_as_string(hide_password=True)
