"""What Dure finds out about a model on a machine and keeps on disk: one file or folder for each key, safe to delete."""

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
from typing import Any

VERSIONED = ("torch", "transformers", "sentence-transformers", "openvino")


def cache_folder() -> Path:
    """$DURE_CACHE, or ~/.cache/dure."""
    return Path(os.environ.get("DURE_CACHE") or Path.home() / ".cache" / "dure")


def key(*parts: Any) -> str:
    """A short name for anything that JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def files(folder: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of change of each file of a model: what tells one from another without reading weights."""
    found = [(str(path.relative_to(folder)), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def versions() -> dict[str, str]:
    """Of the libraries that a measurement or a converted model depends on."""
    installed = {}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


@functools.cache
def processor() -> str:
    """The CPU's name and its instructions for matrices and vectors."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
        flags = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
        wanted = sorted(flag for flag in (flags[1].split() if flags else []) if re.match(r"avx|amx|fma", flag))
        return " ".join([name[1] if name else "", *wanted])
    return platform.processor() or platform.machine()


def cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read(name: str) -> dict[str, Any] | None:
    """What was written under this name; None where there is nothing, or nothing that can be read."""
    try:
        document = json.loads((cache_folder() / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def write(name: str, document: dict[str, Any]) -> None:
    """Put a document in place of the one under this name, in one step. A disk that can't be written is let be."""
    folder = cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(dir=folder, suffix=".part")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(document, file, ensure_ascii=False, indent=1)
        os.replace(path, folder / f"{name}.json")


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Only one process of this machine at a time is in here under this name; it ends with the process at the latest."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            cache_folder().mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((cache_folder() / f"{name}.lock").open("w", encoding="utf-8"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
