"""Holds room on SQLite's disk for deletions, as they also write before they free anything."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sqlite3
from pathlib import Path

logger = logging.getLogger("ray.serve")

LARGEST_BYTES, SMALLEST_BYTES = 4 * 2**20, 2**16
"""SQLite's log grows to 4 MB before it is written back into the file, which may then grow by as much. Deleting a job
takes about 20 kB of the log."""
SHARE = 1 / 16
"""Largest fraction of the free room to hold."""
TIMEOUT_S = 5.0


class Reserve:
    """A file of zeros beside a database. It is deleted when its room is needed, and made again once there is enough."""

    def __init__(self, database: Path) -> None:
        self.database = database
        self.path = database.with_name(f"{database.name}-reserve")

    def is_full(self) -> bool:
        """Whether the database's disk has no room left."""
        return self._free_bytes() < SMALLEST_BYTES

    def take(self) -> None:
        """Hold room, if none is held and there is enough to spare."""
        size = min(LARGEST_BYTES, int(self._free_bytes() * SHARE))
        if self.path.exists() or size < SMALLEST_BYTES:
            return
        try:
            self.path.write_bytes(bytes(size))
        except OSError as error:
            logger.warning("no room can be held for deletions: %s", error)
            self.path.unlink(missing_ok=True)

    def release(self) -> bool:
        """Free what is held. Returns whether there was anything."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        return True

    def give(self) -> None:
        """Free what is held, and the room that SQLite's log takes up."""
        self.release()
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(self.database, TIMEOUT_S)) as plain:
            plain.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.database.parent).free
