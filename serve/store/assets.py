"""Image files, in a local folder or any store that fsspec supports."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from serve import errors
from serve.errors import DureError

logger = logging.getLogger("ray.serve")

Result = TypeVar("Result")

WAIT_S = 30.0
"""Longest wait for an operation on one file."""
LEAST_ROOM_BYTES = 2**16
"""A disk with less free room counts as full."""
TRIAL = ".trial"
"""A file that is created and deleted, or looked up, to check that this works."""


class Assets:
    """Files by path below a folder.

    Raises DureError for a path that leads out of the folder, for a missing file, and while files can't be reached.
    """

    def __init__(self, url: str) -> None:
        self.files, root = fsspec.core.url_to_fs(url)
        self.root = str(root).rstrip("/")
        self.is_local = isinstance(self.files, LocalFileSystem)
        self.failed = False
        """Whether an operation has failed since the last check that found no problem."""
        self._lacking_bytes = 0
        """Size of the largest file that could not be written since then."""

    async def write(self, path: str, content: bytes) -> None:
        at = self._at(path)
        try:
            await self._done(self._write, at, content)
        except DureError:
            self._lacking_bytes = max(self._lacking_bytes, len(content))
            raise
        except FileNotFoundError as error:  # the folder was deleted while the file was written
            raise errors.no_files() from error

    async def read(self, path: str) -> bytes:
        at = self._at(path)
        try:
            return await self._done(self.files.cat_file, at)
        except FileNotFoundError as error:
            raise errors.not_found(f"the image {path!r} is gone") from error

    async def delete(self, path: str) -> None:
        """Delete a file, or a folder with all that is in it; a missing one is no error."""
        await self._done(self._delete, self._at(path))

    async def discard(self, path: str) -> None:
        """Delete a file, and its folder if that is then empty; a missing file is no error."""
        await self._done(self._discard, self._at(path))

    async def problem(self) -> str:
        """Why files can't be reached now, in a few words; empty if they can.

        A local folder is checked each time. Other stores may charge for that, and are checked only after a failure.
        """
        if not self.is_local and not self.failed:
            return ""
        try:
            await asyncio.wait_for(asyncio.to_thread(self._check), WAIT_S)
        except Exception as error:  # each kind of store has its own errors
            self.failed = True
            why = error.strerror if isinstance(error, OSError) else None
            return f"image files can't be written: {why or type(error).__name__}"
        self.failed, self._lacking_bytes = False, 0
        return ""

    def _at(self, path: str) -> str:
        parts = PurePosixPath(path).parts
        if not parts or ".." in parts or parts[0].startswith("/") or "\\" in path or "\0" in path or "://" in path:
            raise errors.invalid(f"{path!r} is not a valid image path")
        return f"{self.root}/{'/'.join(parts)}"

    def _write(self, at: str, content: bytes) -> None:
        self.files.makedirs(at.rpartition("/")[0], exist_ok=True)
        self.files.pipe_file(at, content)

    def _delete(self, at: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.files.rm(at, recursive=True)

    def _discard(self, at: str) -> None:
        self._delete(at)
        if self.is_local:
            with contextlib.suppress(OSError):  # it is not empty, or gone already
                os.rmdir(at.rpartition("/")[0])

    def _check(self) -> None:
        """Raises if nothing can be written."""
        if not self.is_local:
            with contextlib.suppress(FileNotFoundError):
                self.files.info(f"{self.root}/{TRIAL}")
            return
        folder = Path(self.root)
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < max(LEAST_ROOM_BYTES, self._lacking_bytes):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        trial = folder / TRIAL
        trial.touch()
        trial.unlink(missing_ok=True)

    async def _done(self, call: Callable[..., Result], *arguments: Any) -> Result:
        try:
            return await asyncio.wait_for(asyncio.to_thread(call, *arguments), WAIT_S)
        except FileNotFoundError:
            raise
        except Exception as error:  # each kind of store has its own errors
            self.failed = True
            logger.warning("image files can't be reached: %r", error)
            raise (errors.no_room() if _is_full(error) else errors.no_files()) from error


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
