"""Alembic runs this to apply migrations, in one process at a time."""

from alembic import context
from sqlalchemy import create_engine, event, text
from sqlalchemy.pool import NullPool

from serve.store.database import begin, prepare
from serve.store.tables import Table

LOCK = 0x64757265
"""Dure's number among PostgreSQL's advisory locks."""

engine = create_engine(context.config.attributes["url"], poolclass=NullPool)
is_sqlite = engine.dialect.name == "sqlite"
if is_sqlite:
    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", begin)
with engine.connect().execution_options(writes=True) as connection:
    context.configure(connection=connection, target_metadata=Table.metadata, transactional_ddl=True)
    with context.begin_transaction():
        if not is_sqlite:  # SQLite has one writer at a time anyway
            connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
        context.run_migrations()
engine.dispose()
