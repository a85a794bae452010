"""Fetches a config's models into this machine's hub cache before anything is served: `dure fetch`."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils.tqdm import disable_progress_bars
from rich.filesize import decimal

from deployments.checkpoints import hub
from deployments.checkpoints.sources import local_path
from deployments.spec import CheckpointError
from serve.config.settings import Settings

STALE_S = 3600.0
"""An incomplete file that was last written this long ago belongs to a process that was killed."""


@dataclass(frozen=True)
class Download:
    """A hub repository that some of a config's models load from, and the files of it that this machine lacks."""

    models: tuple[str, ...]
    listing: hub.Listing
    missing: dict[str, int]
    """Bytes of each missing file."""

    @property
    def title(self) -> str:
        """Names of the models."""
        return ", ".join(self.models)

    @property
    def bytes(self) -> int:
        """Bytes of all missing files."""
        return sum(self.missing.values())


def downloads_of(settings: Settings) -> tuple[list[Download], list[str]]:
    """The repositories that the models load from, and a line for each problem with one.

    Models that load from a local folder or an installed package are left out.
    """
    disable_progress_bars()  # the hub client's, since the command draws its own
    models: dict[tuple[str, str], list[str]] = {}
    problems = []
    for name, model in settings.models.items():
        if model.upstream:
            continue
        try:
            if local_path(model.source) is not None:
                continue
        except CheckpointError as error:
            problems.append(f"{name}: {error}")
            continue
        if model.revision is None:
            problems.append(f"{name}: source {model.source!r} needs `revision`, a commit or tag")
            continue
        models.setdefault((model.source, model.revision), []).append(name)
    downloads = []
    for (source, revision), names in models.items():
        _sweep(source)
        try:
            listing = hub.listing(source, revision)
            downloads.append(Download(tuple(names), listing, listing.missing()))
        except Exception as error:  # the hub's client raises many kinds
            problems.append(f"{', '.join(names)}: {source} at {revision}: {hub.explain(error)}")
    return downloads, problems


def shortage(downloads: list[Download]) -> str | None:
    """A message if the disk has too little room for the missing files; None if they fit."""
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (cache, *cache.resolve().parents) if path.exists())
    needed, free = sum(download.bytes for download in downloads), shutil.disk_usage(existing).free
    if needed <= free:
        return None
    each = ", ".join(f"{download.title} {decimal(download.bytes)}" for download in downloads if download.bytes)
    return f"{cache} has {decimal(free)} free, but the files to fetch need {decimal(needed)}: {each}"


def fetch(download: Download, arrived: Callable[[int], None]) -> str | None:
    """Fetch the missing files, calling `arrived` with the number of bytes as they come. Returns why it failed, or None.

    An interrupted file is resumed as long as this process lives. A new process starts incomplete files afresh.
    """

    class Meter(_Meter):
        def update(self, n: int = 1) -> None:
            arrived(n)

    source, commit = download.listing.source, download.listing.commit
    try:
        for name in download.missing:
            hf_hub_download(source, name, revision=commit, tqdm_class=Meter)
        download.listing.folder()
    except Exception as error:  # the hub's client raises many kinds
        return f"{download.title}: {source} at {commit}: {hub.explain(error)}"
    return None


class _Meter:
    """Takes the place of the hub client's progress bar. Xet counts bytes transferred and written; only these count."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update_transfer(self, n: int = 1) -> None: ...

    def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

    def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None: ...


def _sweep(source: str) -> None:
    """Remove incomplete files that killed processes left. Nothing resumes them: each download has a new file name."""
    blobs = Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}" / "blobs"
    for part in blobs.glob("*.incomplete"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE_S:
                part.unlink()
