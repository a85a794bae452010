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
"""A disk with less free space than this counts as full."""
TRIAL = ".trial"
"""Name of the file that checks use: created and deleted in a local folder, only looked up in other stores."""


class Assets:
    """Files by path below a folder.

    Methods raise DureError for a path that leads out of the folder, for a missing file, and while files can't be
    reached.
    """

    def __init__(self, url: str) -> None:
        self.files, root = fsspec.core.url_to_fs(url)
        self.root = str(root).rstrip("/")
        self.is_local = isinstance(self.files, LocalFileSystem)
        self.failed = False
        """Whether an operation has failed since the last check that found no problem."""
        self._unwritten_bytes = 0
        """Size of the largest file that could not be written since that check."""

    async def write(self, path: str, content: bytes) -> None:
        at = self._at(path)
        try:
            await self._run(self._write, at, content)
        except DureError:
            self._unwritten_bytes = max(self._unwritten_bytes, len(content))
            raise
        except FileNotFoundError as error:  # the folder was deleted while the file was written
            raise errors.no_files() from error

    async def read(self, path: str) -> bytes:
        at = self._at(path)
        try:
            return await self._run(self.files.cat_file, at)
        except FileNotFoundError as error:
            raise errors.not_found(f"the image {path!r} is gone") from error

    async def delete(self, path: str) -> None:
        """Delete a file, or a folder and all that is in it. It is no error if there is none."""
        await self._run(self._delete, self._at(path))

    async def discard(self, path: str) -> None:
        """Delete a file, and its folder if that is empty then. It is no error if there is none."""
        await self._run(self._discard, self._at(path))

    async def problem(self) -> str:
        """Why files can't be reached now, in a few words; empty if they can.

        A local folder is checked each time. Other stores may charge for requests, so they are checked only after a
        failure.
        """
        if not self.is_local and not self.failed:
            return ""
        try:
            await asyncio.wait_for(asyncio.to_thread(self._check), WAIT_S)
        except Exception as error:  # each kind of store has its own errors
            self.failed = True
            why = error.strerror if isinstance(error, OSError) else None
            return f"image files can't be written: {why or type(error).__name__}"
        self.failed, self._unwritten_bytes = False, 0
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
            with contextlib.suppress(OSError):  # the folder is not empty, or already gone
                os.rmdir(at.rpartition("/")[0])

    def _check(self) -> None:
        """Raises if a local folder can't be written, or another store does not answer."""
        if not self.is_local:
            with contextlib.suppress(FileNotFoundError):
                self.files.info(f"{self.root}/{TRIAL}")
            return
        folder = Path(self.root)
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < max(LEAST_ROOM_BYTES, self._unwritten_bytes):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        trial = folder / TRIAL
        trial.touch()
        trial.unlink(missing_ok=True)

    async def _run(self, operation: Callable[..., Result], *arguments: Any) -> Result:
        """Run an operation on the store in a thread. Raises DureError if it fails, FileNotFoundError as it is."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(operation, *arguments), WAIT_S)
        except FileNotFoundError:
            raise
        except Exception as error:  # each kind of store has its own errors
            self.failed = True
            logger.warning("image files can't be reached: %r", error)
            raise (errors.no_room() if _is_full(error) else errors.no_files()) from error


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
