"""Compares the GPU memory a replica uses with its share and with the plan."""

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

POLL_S = 3.0
"""Seconds between two checks. Reports are no more frequent."""
MIN_CHANGE = 0.02
"""Smallest change worth reporting, as a fraction of the share."""


@dataclass(frozen=True)
class GpuUse:
    """GPU memory of a replica at one moment. `share` is a fraction of one GPU."""

    share: float
    share_mb: float
    planned_mb: float | None
    """None if the model can't be planned."""
    used_mb: float
    over_share: bool


class GpuShare:
    """Compares the bytes that `used` returns with the share that a replica has booked."""

    def __init__(self, model: str, share: float, gpu_bytes: float, used: Callable[[], int]) -> None:
        self.model = model
        self.share = share
        self.gpu_bytes = gpu_bytes
        self.share_bytes = share * gpu_bytes
        self.planned_bytes: int | None = None
        self._used = used
        self._reported: GpuUse | None = None
        self._warned = False
        GPU_SHARE.set(self.share_bytes)
        GPU_MEMORY.set_function(used)
        GPU_OVER_SHARE.set_function(lambda: used() > self.share_bytes)

    @classmethod
    def on_cuda(cls, model: str, share: float) -> GpuShare:
        """Watch this process's GPUs: all of them if the model is spread.

        Used memory is what torch has reserved, in use or not, plus CUDA's context as the plan assumes it.
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
        """Set the bytes that the plan expects the model to use. A reload may change them."""
        self.planned_bytes = count
        GPU_PLANNED.set(count or 0)

    def use(self) -> GpuUse:
        used = self._used()
        planned = None if self.planned_bytes is None else _mb(self.planned_bytes)
        return GpuUse(self.share, _mb(self.share_bytes), planned, _mb(used), used > self.share_bytes)

    def change(self) -> GpuUse | None:
        """The current use if it differs from the last report, else None. Logs once if the share is exceeded."""
        use, reported = self.use(), self._reported
        if use.over_share and not self._warned:
            self._warned = True
            would_do = math.ceil(100 * use.used_mb / _mb(self.gpu_bytes)) / 100
            logger.warning(
                "%s uses %.0f MB of GPU memory, more than its share of %.0f MB; num_gpus: %g would be enough",
                self.model,
                use.used_mb,
                use.share_mb,
                would_do,
            )
        if (
            reported is not None
            and (reported.over_share, reported.planned_mb) == (use.over_share, use.planned_mb)
            and abs(use.used_mb - reported.used_mb) <= MIN_CHANGE * use.share_mb
        ):
            return None
        self._reported = use
        return use


def planned_bytes(spec: ModelSpec) -> int | None:
    """Bytes that `dure plan` expects a replica to use; None for a kind of model that it does not know."""
    if not spec.footprint:
        return None
    try:
        return footprint(spec, resolve(spec.source, spec.revision, download=False)).total
    except Exception as error:  # an unknown kind of config may lack anything, but the model still serves
        logger.warning("%s can't be planned: %r", spec.name, error)
        return None


def _mb(count: float) -> float:
    return round(count / 2**20, 1)
