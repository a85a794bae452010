"""What a replica takes of its GPU, beside its share of it and what was planned for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from deployments.checkpoints.footprint import CONTEXT_BYTES, footprint
from deployments.checkpoints.sources import resolve
from deployments.metrics import GPU_MEMORY, GPU_OVER_SHARE, GPU_PLANNED, GPU_SHARE
from deployments.spec import ModelSpec

logger = logging.getLogger("ray.serve")

LOOK_S = 3.0
"""From one look to the next; news is told no more often."""
NEWS = 0.02
"""Of the share: what changes by less is no news."""


@dataclass(frozen=True)
class GpuUse:
    """At one moment. `share` is of a GPU."""

    share: float
    share_mb: float
    planned_mb: float | None
    """None for a model that can't be planned."""
    used_mb: float
    over_share: bool


class GpuShare:
    """Holds what `used` answers, in bytes, against the share that a replica has booked."""

    def __init__(self, model: str, share: float, gpu_bytes: float, used: Callable[[], int]) -> None:
        self.model = model
        self.share = share
        self.gpu_bytes = gpu_bytes
        self.share_bytes = share * gpu_bytes
        self.planned_bytes: int | None = None
        self._used = used
        self._told: GpuUse | None = None
        self._warned = False
        GPU_SHARE.set(self.share_bytes)
        GPU_MEMORY.set_function(used)
        GPU_OVER_SHARE.set_function(lambda: used() > self.share_bytes)

    @classmethod
    def on_cuda(cls, model: str, share: float) -> GpuShare:
        """Of this process's GPUs, all of them where the model is spread.

        What it takes is what torch has reserved, in use or not, and CUDA's context as the plan has it.
        """
        import torch

        gpus = range(torch.cuda.device_count())
        total = sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
        return cls(
            model,
            share,
            total / len(gpus),
            lambda: sum(torch.cuda.memory_reserved(gpu) + CONTEXT_BYTES for gpu in gpus),
        )

    def planned(self, count: int | None) -> None:
        """What the plan says that the model takes, which a reload may change."""
        self.planned_bytes = count
        GPU_PLANNED.set(count or 0)

    def use(self) -> GpuUse:
        used = self._used()
        planned = None if self.planned_bytes is None else _mb(self.planned_bytes)
        return GpuUse(self.share, _mb(self.share_bytes), planned, _mb(used), used > self.share_bytes)

    def news(self) -> GpuUse | None:
        """How it is, where that is not what was told last; the first time that it is over its share is logged."""
        use, told = self.use(), self._told
        if use.over_share and not self._warned:
            self._warned = True
            would_do = math.ceil(100 * use.used_mb / _mb(self.gpu_bytes)) / 100
            logger.warning(
                "%s takes %.0f MB of its GPU, and its share is %.0f MB; num_gpus: %g would do",
                self.model,
                use.used_mb,
                use.share_mb,
                would_do,
            )
        if (
            told is not None
            and (told.over_share, told.planned_mb) == (use.over_share, use.planned_mb)
            and abs(use.used_mb - told.used_mb) <= NEWS * use.share_mb
        ):
            return None
        self._told = use
        return use


def planned_bytes(spec: ModelSpec) -> int | None:
    """What `dure plan` says that a replica takes; None for a model of a kind that it does not know."""
    if not spec.footprint:
        return None
    try:
        return footprint(spec, resolve(spec.source, spec.revision, download=False)).total
    except Exception as error:  # a config of another kind may lack anything; the model serves all the same
        logger.warning("%s can't be planned: %r", spec.name, error)
        return None


def _mb(count: float) -> float:
    return round(count / 2**20, 1)
