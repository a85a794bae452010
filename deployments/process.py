"""What a process may use of its machine: threads, and a share of a GPU or none."""

from __future__ import annotations

import os
import sys

from deployments import disk_cache
from deployments.spec import ModelSpec


def hold_to(spec: ModelSpec) -> None:
    """Let this process use what a replica of the model may; best called before torch is imported."""
    if not spec.gpu_share:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # from an actor that books no GPU, Ray hides none
    use_threads(spec.threads or disk_cache.cores())
    keep_to_share(spec.gpu_share)


def use_threads(count: int) -> None:
    """Let a batch be computed by so many threads, whether torch is here already, is yet to come, or never does."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


def keep_to_share(share: float) -> None:
    """Let this process take no more of its GPU's memory than its share: Ray only places by it.

    torch counts what it allocates; CUDA's own is part of the share, too.
    """
    if not 0 < share < 1:
        return
    import torch

    from deployments.checkpoints.footprint import CONTEXT_BYTES

    if torch.cuda.is_available():
        own = CONTEXT_BYTES / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(share - own, share / 10))
