"""The version of the code that a deploy runs. Serve replaces replicas when settings change, but not when code does."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

from serve.config.settings import Settings

DURE = ("serve", "deployments")
LARGE = 2**20
"""Files of at least this many bytes are weights and the like; only their names and sizes count."""


def code_version(packages: Iterable[str]) -> str:
    """A hash of these top-level packages and modules as they are on this machine; missing ones are left out."""
    digest = hashlib.sha256()
    for package in sorted(set(packages)):
        for name, path in _files(package):
            content = path.read_bytes() if path.stat().st_size < LARGE else b""
            digest.update(f"{package}/{name} {path.stat().st_size}\n".encode() + content)
    return digest.hexdigest()[:16]


def run_by(settings: Settings) -> Iterator[str]:
    """Top-level packages that replicas run: Dure's, and those of custom engines and policies (MODULE:NAME)."""
    yield from DURE
    for model in settings.models.values():
        for name in (model.task, model.autoscaling.policy):
            if name and ":" in name:
                yield name.partition(":")[0].partition(".")[0]


def _files(package: str) -> Iterator[tuple[str, Path]]:
    """Each file of the package, after its path relative to the package."""
    found = importlib.util.find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                yield str(path.relative_to(folder)), path
    if found and found.origin and not found.submodule_search_locations:
        yield "", Path(found.origin)
