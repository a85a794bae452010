"""Which code a deploy is of. Serve replaces replicas where their settings differ, and does not look at the code."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

from serve.config.settings import Settings

DURE = ("serve", "deployments")
LARGE = 2**20
"""Files from this size on are weights and the like, and known by their names and sizes."""


def code_version(packages: Iterable[str]) -> str:
    """Of what these top-level packages and modules are on this machine, as far as it has them."""
    digest = hashlib.sha256()
    for package in sorted(set(packages)):
        for name, path in _files(package):
            content = path.read_bytes() if path.stat().st_size < LARGE else b""
            digest.update(f"{package}/{name} {path.stat().st_size}\n".encode() + content)
    return digest.hexdigest()[:16]


def run_by(settings: Settings) -> Iterator[str]:
    """What replicas run: Dure, and the engines and policies of one's own that the settings call MODULE:NAME."""
    yield from DURE
    for model in settings.models.values():
        for name in (model.task, model.autoscaling.policy):
            if name and ":" in name:
                yield name.partition(":")[0].partition(".")[0]


def _files(package: str) -> Iterator[tuple[str, Path]]:
    """With their names below it."""
    found = importlib.util.find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                yield str(path.relative_to(folder)), path
    if found and found.origin and not found.submodule_search_locations:
        yield "", Path(found.origin)
