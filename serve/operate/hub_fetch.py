"""A config's models in this machine's hub cache before anything is served: `dure fetch`."""

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
from deployments.checkpoints.sources import local_folder
from deployments.spec import CheckpointError
from serve.config.settings import Settings

STALE_S = 3600.0
"""A file that is still incomplete, and was last written to so long ago, belongs to a process that was killed."""


@dataclass(frozen=True)
class Need:
    """A repository that models of a config load from, and the bytes of its files that are still to come."""

    models: tuple[str, ...]
    listing: hub.Listing
    missing: dict[str, int]

    @property
    def title(self) -> str:
        return ", ".join(self.models)

    @property
    def bytes(self) -> int:
        return sum(self.missing.values())


def needs_of(settings: Settings) -> tuple[list[Need], list[str]]:
    """What the models need of hubs, those with sources on this machine left out; and what can't be had, a line each."""
    disable_progress_bars()  # of the hub's client
    models: dict[tuple[str, str], list[str]] = {}
    problems = []
    for name, model in settings.models.items():
        try:
            if local_folder(model.source) is not None:
                continue
        except CheckpointError as error:
            problems.append(f"{name}: {error}")
            continue
        if model.revision is None:
            problems.append(f"{name}: source {model.source!r} lacks `revision`, a commit or tag")
            continue
        models.setdefault((model.source, model.revision), []).append(name)
    needs = []
    for (source, revision), names in models.items():
        _sweep(source)
        try:
            listing = hub.listing(source, revision)
            needs.append(Need(tuple(names), listing, listing.missing()))
        except Exception as error:  # the hub's client raises many kinds
            problems.append(f"{', '.join(names)}: {source} at {revision}: {hub.explain(error)}")
    return needs, problems


def shortage(needs: list[Need]) -> str | None:
    """What is still to come against the room that there is; None where it fits."""
    cache = Path(constants.HF_HUB_CACHE)
    there = next(path for path in (cache, *cache.resolve().parents) if path.exists())
    wanted, free = sum(need.bytes for need in needs), shutil.disk_usage(there).free
    if wanted <= free:
        return None
    each = ", ".join(f"{need.title} {decimal(need.bytes)}" for need in needs if need.bytes)
    return f"{cache} has {decimal(free)} free, {decimal(wanted - free)} too little for what is to come: {each}"


def fetch(need: Need, told: Callable[[int], None]) -> str | None:
    """Fetch what is missing, telling of bytes as they come; why it failed, or None.

    What was broken off goes on where it was, as long as this process lives; later only files that are whole count.
    """

    class Meter(_Meter):
        def update(self, n: int = 1) -> None:
            told(n)

    source, commit = need.listing.source, need.listing.commit
    try:
        for name in need.missing:
            hf_hub_download(source, name, revision=commit, tqdm_class=Meter)
        need.listing.folder()
    except Exception as error:  # the hub's client raises many kinds
        return f"{need.title}: {source} at {commit}: {hub.explain(error)}"
    return None


class _Meter:
    """What the hub's client takes for a progress bar. Of Xet's two counts it heeds that of bytes written."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update_transfer(self, n: int = 1) -> None: ...

    def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

    def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None: ...


def _sweep(source: str) -> None:
    """Remove what killed processes left half done: the client begins each file under a new name."""
    blobs = Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}" / "blobs"
    for part in blobs.glob("*.incomplete"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE_S:
                part.unlink()
