"""Limits what a process uses of its machine: threads, and its share of a GPU."""

from __future__ import annotations

import os
import sys

from deployments import disk_cache
from deployments.spec import ModelSpec


def hold_to(spec: ModelSpec) -> None:
    """Limit this process to what a replica of the model may use. Best called before torch is imported."""
    if not spec.gpu_share:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPUs from an actor that books none
    use_threads(spec.threads or disk_cache.cores())
    keep_to_share(spec.gpu_share)


def use_threads(count: int) -> None:
    """Use `count` threads per batch, whether torch is already imported, is imported later, or never."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


def keep_to_share(share: float) -> None:
    """Limit this process to its share of the GPU's memory, as Ray only uses shares to place replicas.

    torch limits only its own allocations, so CUDA's memory is subtracted from the share.
    """
    if not 0 < share < 1:
        return
    import torch

    from deployments.checkpoints.footprint import CONTEXT_BYTES

    if torch.cuda.is_available():
        own = CONTEXT_BYTES / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(share - own, share / 10))
