"""Models on a hub: which files of a repository Dure loads, and where they are cached on this machine."""

from __future__ import annotations

import errno
import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.hf_api import RepoFile

OTHERS = (
    *("onnx/*", "*.onnx", "*.onnx_data", "openvino/*", "openvino_model*", "coreml/*", "*.mlmodel", "*.mlpackage/*"),
    *("*.h5", "*.tflite", "*.pb", "*.msgpack", "*.ot", "*.gguf", "*.ggml", "original/*", "consolidated*"),
    *("optimizer.*", "scheduler.*", "training_args.bin", "rng_state*", "runs/*", "*.tfevents*"),
    *(".git*", "*.md", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.pdf", "*.mp4"),
)
"""Files that Dure never loads: weights for other runtimes, files left by training, and documents and pictures."""


@dataclass(frozen=True)
class Listing:
    """The files that Dure loads of a repository at one commit. Both methods raise the errors of the hub's client."""

    source: str
    commit: str
    names: list[str]

    def missing(self) -> dict[str, int]:
        """Bytes of each file that is not in this machine's cache. Asks the hub."""
        files = snapshot_download(self.source, revision=self.commit, allow_patterns=self._patterns, dry_run=True)
        sizes = {file.filename: file.file_size or 0 for file in files if file.will_download}
        return {name: sizes[name] for name in self.names if name in sizes}

    def folder(self, download: bool = True) -> Path:
        """The folder with all files. Missing ones are fetched; without `download` all must be cached."""
        return Path(
            snapshot_download(
                self.source, revision=self.commit, allow_patterns=self._patterns, local_files_only=not download
            )
        )

    @property
    def _patterns(self) -> list[str]:
        return [glob.escape(name) for name in self.names]


def loaded(names: Iterable[str]) -> list[str]:
    """The files of a repository that Dure loads. If weights are there in two formats, the safetensors."""
    paths = [PurePosixPath(name) for name in names if not any(fnmatchcase(name, pattern) for pattern in OTHERS)]
    safe = {path.parent for path in paths if fnmatchcase(path.name, "model*.safetensors")}
    return [str(path) for path in paths if path.parent not in safe or not fnmatchcase(path.name, "pytorch_model*.bin*")]


def listing(source: str, revision: str, download: bool = True) -> Listing:
    """Ask the hub, unless the answer is cached and `revision` is a commit, which never changes.

    Without `download` the hub is not asked. Raises the errors of the hub's client; `explain` puts them in words.
    """
    resolved = HfApi().resolve_revision(source, revision=revision, local_files_only=not download)
    try:
        tree = get_cached_repo_tree(source, revision=resolved)
    except CachedRepoTreeNotFoundError:
        if not download:
            raise
        entries = HfApi().list_repo_tree(source, recursive=True, revision=resolved.resolved)
        tree = [entry for entry in entries if isinstance(entry, RepoFile)]
    return Listing(source, resolved.resolved, loaded(entry.path for entry in tree))


def folder(source: str, revision: str, download: bool = True) -> Path:
    """The folder with the files that Dure loads. Missing ones are fetched; without `download` all must be cached.

    If the hub does not answer, the cache is used as it is. Raises the errors of the hub's client.
    """
    try:
        found = listing(source, revision, download)
    except Exception as error:  # the client raises many kinds of errors
        try:
            return Path(snapshot_download(source, revision=revision, local_files_only=True))
        except Exception:
            raise error from None
    return found.folder(download)


def explain(error: Exception) -> str:
    """One line on why a request to the hub failed."""
    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return "it is not in this machine's cache, and HF_HUB_OFFLINE is set"
        if isinstance(cause, GatedRepoError):
            return "its owner has to grant access on the hub; then set HF_TOKEN"
        if isinstance(cause, RepositoryNotFoundError):
            return f"{constants.ENDPOINT} has no such model, or it is private and needs HF_TOKEN"
        if isinstance(cause, RevisionNotFoundError):
            return f"{constants.ENDPOINT} has no such revision of it"
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            return f"the disk of {constants.HF_HUB_CACHE} is full"
    *_, root = _causes(error)
    if isinstance(root, CachedRepoTreeNotFoundError | RevisionResolutionError):
        return "it is not in this machine's cache; `dure fetch` puts it there"
    return f"{constants.ENDPOINT}: {type(root).__name__}: {str(root).strip().partition(chr(10))[0]}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
