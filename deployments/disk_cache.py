"""A cache on disk for what Dure learns about models on this machine: one file or folder per key, safe to delete."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

VERSIONED = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy", "openvino", "bitsandbytes")
REMEMBERED_BYTES = 2**20
"""Digests are kept for files of at least this size. Smaller files are hashed as fast as a digest is read."""


def cache_folder() -> Path:
    """$DURE_CACHE, or ~/.cache/dure."""
    return Path(os.environ.get("DURE_CACHE") or Path.home() / ".cache" / "dure")


def key(*parts: Any) -> str:
    """A name for any values that JSON can represent."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a file. For a large file it is kept until the file is written or replaced.

    That shows in the time of change (st_ctime), which can't be set back. Installers and images set back the time of
    modification.
    """
    stat = path.stat()
    if stat.st_size < REMEMBERED_BYTES:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    where = [str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    name = "digest-" + key(where)
    known = (read(name) or {}).get("sha256")
    if not isinstance(known, str):
        with path.open("rb") as file:
            known = hashlib.file_digest(file, "sha256").hexdigest()
        write(name, {"file": str(path), "sha256": known})
    return known


@functools.cache
def code() -> str:
    """Digest of all code that loads, converts and measures models."""
    here = Path(__file__).parent
    files = [path for path in sorted(here.rglob("*")) if path.suffix in (".py", ".toml")]
    return key(*(f"{path.relative_to(here)} {digest(path)}" for path in files))


def versions() -> dict[str, str]:
    """Versions of the libraries that a measurement or a converted model depends on."""
    installed = {}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


@functools.cache
def processor() -> str:
    """The CPU's name and its vector and matrix instructions."""
    known = _cpuinfo("model name") or platform.processor() or platform.machine()
    return " ".join([known, *sorted(flag for flag in _cpuinfo("flags").split() if re.match(r"avx|amx|fma", flag))])


def hardware(on_gpu: bool) -> str:
    """What a measurement depends on: the name of the GPU, or the CPU's with its instructions."""
    if not on_gpu:
        return processor()
    import torch

    return torch.cuda.get_device_name()


def half_precision() -> Literal["bf16"] | None:
    """The half precision that the CPU multiplies fast; None if there is none."""
    return "bf16" if {"amx_bf16", "avx512_bf16"} & set(_cpuinfo("flags").split()) else None


@functools.cache
def _cpuinfo(name: str) -> str:
    with contextlib.suppress(OSError):
        found = re.search(rf"^{name}\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        return found[1] if found else ""
    return ""


def cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read(name: str) -> dict[str, Any] | None:
    """The document under this name; None if there is none, or it can't be read."""
    try:
        document = json.loads((cache_folder() / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def write(name: str, document: dict[str, Any]) -> None:
    """Replace the document under this name atomically. Disk errors are ignored."""
    folder = cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(dir=folder, suffix=".part")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(document, file, ensure_ascii=False, indent=1)
        os.replace(path, folder / f"{name}.json")


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Machine-wide lock under this name, released when the block or the process ends."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            cache_folder().mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((cache_folder() / f"{name}.lock").open("w", encoding="utf-8"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
