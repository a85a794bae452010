"""The memory that batches are computed in, as far as it limits them."""

from __future__ import annotations

from typing import Protocol


class Memory(Protocol):
    @property
    def is_share(self) -> bool:
        """The process is held to a share, which is planned for its largest batch and nobody else's."""

    def free_bytes(self) -> int | None:
        """None where it does not limit batches."""

    def begin(self) -> None:
        """A batch is about to run."""

    def batch_bytes(self) -> int:
        """What the last batch took at its peak, above what was taken before it."""

    def release(self) -> None:
        """Give back what is kept for later; called when memory has run out."""


class CpuMemory:
    """A CPU's is large and shared; what batches of sensible size take of it is small beside the weights."""

    is_share = False

    def free_bytes(self) -> int | None:
        return None

    def begin(self) -> None: ...

    def batch_bytes(self) -> int:
        return 0

    def release(self) -> None: ...


class GpuMemory:
    """The GPU's, as far as this process may take it."""

    def __init__(self) -> None:
        self._before = 0

    @property
    def is_share(self) -> bool:
        import torch

        return torch.cuda.get_per_process_memory_fraction() < 1

    def free_bytes(self) -> int | None:
        return gpu_free_bytes()

    def begin(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def batch_bytes(self) -> int:
        import torch

        return int(torch.cuda.max_memory_allocated() - self._before)

    def release(self) -> None:
        import torch

        torch.cuda.empty_cache()


def gpu_count() -> int:
    """GPUs of this machine that torch can use."""
    import torch

    return torch.cuda.device_count()


def gpu_free_bytes() -> int:
    """What tensors of this process may still take: what is free on its GPU, with what torch has set aside and not used,
    and no more than is left of what the process is held to.
    """
    import torch

    free, total = torch.cuda.mem_get_info()
    used = torch.cuda.memory_allocated()
    left = torch.cuda.get_per_process_memory_fraction() * total - used
    return max(0, int(min(free + torch.cuda.memory_reserved() - used, left)))


def device_memory(device: str) -> Memory:
    """The memory of the device that an engine's facts name."""
    return GpuMemory() if device == "cuda" else CpuMemory()
