"""Looks at a machine every few seconds, and says when it should be given no more work until what it has is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import pynvml

from serve.metrics import NODE_LOAD
from serve.settings import GuardSettings

SAMPLE_S = 3.0
BACK = 0.05
"""Work is taken again once the load is this much below its limit: at the limit itself it would come and go."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Load:
    """Shares of what a machine has that are in use, 0 to 1."""

    memory: float
    cpu: float
    """Since it was last asked for."""
    gpu_memory: float
    """Of the fullest GPU; 0 where there is none."""


class Guard:
    def __init__(self, limits: GuardSettings, look: Callable[[], Load] | None = None) -> None:
        self.limits = limits
        self.look = look or load
        self.over: dict[str, float] = {}
        """What is used too much, and how much."""

    def sample(self) -> None:
        found = asdict(self.look())
        for name, share in found.items():
            NODE_LOAD.labels(name).set(share)
        limits = {name: limit for name, limit in self.limits if limit is not None}
        self.over = {
            name: found[name]
            for name, limit in limits.items()
            if found[name] >= (limit - BACK if name in self.over else limit)
        }

    @property
    def reason(self) -> str:
        """Why no work should begin; empty where it may."""
        return " and ".join(f"{name.replace('_', ' ')} is at {share:.0%}" for name, share in self.over.items())


def load() -> Load:
    return Load(_memory(), psutil.cpu_percent() / 100, _gpu_memory())


def _memory() -> float:
    """Of the machine's, or of what a container may take."""
    machine = psutil.virtual_memory()
    shares = [1 - machine.available / machine.total]
    with contextlib.suppress(OSError, ValueError):
        limit = int((CGROUP / "memory.max").read_text())
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
        shares.append((int((CGROUP / "memory.current").read_text()) - int(cached)) / limit)
    return max(shares)


def _gpu_memory() -> float:
    try:
        pynvml.nvmlInit()
        gpus = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        return max((memory.used / memory.total for memory in map(pynvml.nvmlDeviceGetMemoryInfo, gpus)), default=0.0)
    except pynvml.NVMLError:
        return 0.0
