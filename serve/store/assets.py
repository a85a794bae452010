"""Image files: in a local folder, or wherever fsspec reaches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, TypeVar

import fsspec

from serve import errors

logger = logging.getLogger("ray.serve")

Result = TypeVar("Result")

WAIT_S = 30.0
"""For one file."""


class Assets:
    """Files by paths below a folder, which no path leads out of.

    Raises DureError for a path that does, a file that is not there, and where files can't be had now.
    """

    def __init__(self, url: str) -> None:
        self.files, root = fsspec.core.url_to_fs(url)
        self.root = str(root).rstrip("/")

    async def write(self, path: str, content: bytes) -> None:
        await self._done(self._write, self._at(path), content)

    async def read(self, path: str) -> bytes:
        at = self._at(path)
        try:
            return await self._done(self.files.cat_file, at)
        except FileNotFoundError as error:
            raise errors.not_found(f"the image {path} is gone") from error

    async def delete(self, path: str) -> None:
        """A file, or a folder with all that is in it; also where it is not there."""
        await self._done(self._delete, self._at(path))

    def _at(self, path: str) -> str:
        parts = PurePosixPath(path).parts
        if not parts or ".." in parts or parts[0].startswith("/") or "\\" in path or "\0" in path or "://" in path:
            raise errors.invalid(f"{path!r} is no path of an image here")
        return f"{self.root}/{'/'.join(parts)}"

    def _write(self, at: str, content: bytes) -> None:
        self.files.makedirs(at.rpartition("/")[0], exist_ok=True)
        self.files.pipe_file(at, content)

    def _delete(self, at: str) -> None:
        try:
            self.files.rm(at, recursive=True)
        except FileNotFoundError:
            return

    async def _done(self, call: Callable[..., Result], *arguments: Any) -> Result:
        try:
            return await asyncio.wait_for(asyncio.to_thread(call, *arguments), WAIT_S)
        except FileNotFoundError:
            raise
        except Exception as error:  # each kind of store has errors of its own
            logger.warning("the assets can't be reached: %r", error)
            raise errors.no_files() from error
