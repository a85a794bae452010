"""Migrations, each of which the version before it lives on with."""

from __future__ import annotations

import datetime
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from alembic import command, op
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, Table, create_engine, insert, select
from sqlalchemy.types import JSON, DateTime, Integer, Uuid

from serve.store import migrate
from serve.store.database import address
from tests.dure import ROOT


def revisions() -> list[str]:
    scripts = ScriptDirectory.from_config(migrate._config("sqlite://"))
    return [script.revision for script in reversed(list(scripts.walk_revisions()))]


def tables(connection: Connection) -> list[Table]:
    metadata = MetaData()
    metadata.reflect(connection)
    return [table for table in metadata.sorted_tables if table.name != "alembic_version"]


def fill(connection: Connection, known: list[Table]) -> None:
    """A row in each table, as a version writes it that knows of these columns and no others."""
    ids: dict[str, Any] = {}
    for table in known:
        row: dict[str, Any] = {}
        for column in table.columns:
            if column.foreign_keys:
                [key] = column.foreign_keys
                row[column.name] = ids[key.target_fullname]
            elif not column.nullable:
                row[column.name] = _value(column.type)
            if column.primary_key:
                ids[f"{table.name}.{column.name}"] = row[column.name]
        connection.execute(insert(table).values(row))
        assert connection.execute(select(table)).first()


def _value(kind: Any) -> Any:
    if isinstance(kind, DateTime):
        return datetime.datetime.now(datetime.UTC)
    if isinstance(kind, Integer):
        return 1
    if isinstance(kind, JSON):
        return {"a": 1}
    return uuid.uuid4() if isinstance(kind, Uuid) else uuid.uuid4().hex[:16]


def test_the_tables_are_those_that_the_code_knows(url: str) -> None:
    before, after = migrate.migrate(url)
    assert (before, after) == (None, revisions()[-1])
    command.check(migrate._config(url))
    migrate.check(url)
    assert migrate.migrate(url) == (after, after)


def test_the_version_before_goes_on_writing_after_each_migration(url: str) -> None:
    engine = create_engine(address(url, synchronous=True))
    known: list[Table] = []
    for revision in revisions():
        migrate.migrate(url, revision)
        with engine.begin() as connection:
            fill(connection, known)
            known = tables(connection)
    engine.dispose()


def test_a_database_that_lacks_a_migration_is_not_used(url: str) -> None:
    migrate.migrate(url, revisions()[0])
    with pytest.raises(migrate.SchemaError, match="dure migrate"):
        migrate.check(url)


def test_a_database_that_a_later_version_has_migrated_is_used(url: str) -> None:
    migrate.migrate(url)
    engine = create_engine(address(url, synchronous=True))
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    migrate.check(url)
    assert migrate.migrate(url) == ("9999", "9999")
    migrate.make_ready(url)


def test_servers_that_start_together_migrate_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'dure.sqlite3'}"
    script = f"from serve.store import migrate; migrate.make_ready({url!r})"
    starting = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) for _ in range(3)]
    assert [each.wait(180) for each in starting] == [0, 0, 0]
    migrate.check(url)


def test_a_migration_that_is_cut_short_leaves_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create_index = op.create_index
    monkeypatch.setattr(op, "create_index", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        migrate.migrate(url)
    assert migrate.present(url) is None
    monkeypatch.setattr(op, "create_index", create_index)
    assert migrate.migrate(url) == (None, revisions()[-1])


def test_a_database_that_is_not_there_is_named_without_its_password() -> None:
    with pytest.raises(migrate.SchemaError, match=r"127\.0\.0\.1:9") as caught:
        migrate.check("postgresql://me:secret@127.0.0.1:9/none")
    assert "secret" not in str(caught.value)
