"""Room that is held on SQLite's disk for deleting: what deletes writes, too, before it frees anything."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sqlite3
from pathlib import Path

logger = logging.getLogger("ray.serve")

LARGEST_BYTES, SMALLEST_BYTES = 4 * 2**20, 2**16
"""SQLite's log grows to 4 MB before it is written back into the file, which may grow by as much then. To delete a job
takes some 20 kB of the log."""
SHARE = 1 / 16
"""Of what is free, at most."""
TIMEOUT_S = 5.0


class Reserve:
    """A file of nothing beside a database, which goes where its room is needed and comes back once there is enough."""

    def __init__(self, database: Path) -> None:
        self.database = database
        self.path = database.with_name(f"{database.name}-reserve")

    def is_full(self) -> bool:
        """Is there no room on the database's disk?"""
        return self._free_bytes() < SMALLEST_BYTES

    def take(self) -> None:
        """Hold room, if there is none held and enough to spare."""
        size = min(LARGEST_BYTES, int(self._free_bytes() * SHARE))
        if self.path.exists() or size < SMALLEST_BYTES:
            return
        try:
            self.path.write_bytes(bytes(size))
        except OSError as error:
            logger.warning("no room can be held for deleting: %s", error)
            self.path.unlink(missing_ok=True)

    def release(self) -> bool:
        """Free what is held. Was there anything?"""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        return True

    def give(self) -> None:
        """Free what is held, and what SQLite's log takes up."""
        self.release()
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(self.database, TIMEOUT_S)) as plain:
            plain.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.database.parent).free
