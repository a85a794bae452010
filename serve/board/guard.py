"""Samples machine load every few seconds and says when to stop admitting work."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml

from serve.config.settings import GuardSettings
from serve.metrics import NODE_LOAD

SAMPLE_S = 3.0
BACK = 0.05
"""Work is admitted again once load is this far below its limit; at the limit itself the guard would flap."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Load:
    """Fractions of a machine's resources in use, 0 to 1."""

    memory: float
    cpu: float
    """Since the last sample."""
    gpu_memory: float
    """Of the fullest GPU that this process may use; 0 if it has none."""


class Guard:
    def __init__(self, limits: GuardSettings, look: Callable[[], Load] | None = None) -> None:
        self.limits = limits
        self.look = look or Machine().load
        self.over: dict[str, float] = {}
        """Resources over their limit, and the fraction in use."""

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
        """Why no new work should begin; empty if it may."""
        return " and ".join(f"{name.replace('_', ' ')} is at {share:.0%}" for name, share in self.over.items())


class Machine:
    """This machine, or the container that this process runs in."""

    def __init__(self) -> None:
        self._used_us, self._at = 0, 0.0
        """CPU time the container had used at the last sample, and when that was (time.monotonic)."""

    def load(self) -> Load:
        return Load(_memory(), self._cpu(), _gpu_memory())

    def _cpu(self) -> float:
        """Fraction of the container's CPU quota in use, or of the machine's CPU if there is no quota; 0 at first.

        cpu.max holds the quota and the period it applies to, in microseconds:
        https://docs.kernel.org/admin-guide/cgroup-v2.html.
        """
        try:
            quota_us, period_us = map(int, _cgroup("cpu.max").split())
            used_us = int(dict(line.split() for line in _cgroup("cpu.stat").splitlines())["usage_usec"])
        except (OSError, ValueError):  # no cgroup of its own, or a quota of "max"
            return psutil.cpu_percent() / 100
        before_us, before = self._used_us, self._at
        self._used_us, self._at = used_us, time.monotonic()
        if not before:
            return 0.0
        return min(1.0, (used_us - before_us) / ((self._at - before) * 1e6 * quota_us / period_us))


def _cgroup(name: str) -> str:
    return (CGROUP / name).read_text(encoding="utf-8")


def _memory() -> float:
    """Fraction of the machine's memory in use, or of the container's limit if that is higher."""
    machine = psutil.virtual_memory()
    shares = [1 - machine.available / machine.total]
    with contextlib.suppress(OSError, ValueError):
        limit = int(_cgroup("memory.max"))
        cached = dict(line.split() for line in _cgroup("memory.stat").splitlines())["inactive_file"]
        shares.append((int(_cgroup("memory.current")) - int(cached)) / limit)
    return max(shares)


def _gpu_memory() -> float:
    try:
        pynvml.nvmlInit()
        gpus = [_gpu(name) for name in _visible_gpus()]
        return max((memory.used / memory.total for memory in map(pynvml.nvmlDeviceGetMemoryInfo, gpus)), default=0.0)
    except pynvml.NVMLError:
        return 0.0


def _visible_gpus() -> list[str]:
    """Numbers or UUIDs. Ray tells a replica through this variable which GPUs it may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(pynvml.nvmlDeviceGetCount())]
    return [name for name in visible.split(",") if name]


def _gpu(name: str) -> Any:
    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
