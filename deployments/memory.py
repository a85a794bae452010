"""The memory that limits how large batches can be."""

from __future__ import annotations

from typing import Protocol


class Memory(Protocol):
    @property
    def is_share(self) -> bool:
        """Whether the process has a share of its own, planned for its largest batch."""

    def free_bytes(self) -> int | None:
        """Bytes free for a batch; None if memory does not limit batches."""

    def begin(self) -> None:
        """Call before each batch."""

    def batch_bytes(self) -> int:
        """Peak bytes of the last batch, above what was in use before it."""

    def release(self) -> None:
        """Free cached memory. Called when memory has run out."""


class CpuMemory:
    """A CPU's memory sets no limit: batches of sensible size take little beside the weights."""

    is_share = False

    def free_bytes(self) -> int | None:
        return None

    def begin(self) -> None: ...

    def batch_bytes(self) -> int:
        return 0

    def release(self) -> None: ...


class GpuMemory:
    """The GPU memory that this process may use."""

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
    """Number of GPUs of this machine that torch can use."""
    import torch

    return torch.cuda.device_count()


def gpu_free_bytes() -> int:
    """Bytes that this process's tensors may still take: what is free on the GPU, plus what torch has reserved but not
    used, up to what is left of the process's share.
    """
    import torch

    free, total = torch.cuda.mem_get_info()
    used = torch.cuda.memory_allocated()
    left = torch.cuda.get_per_process_memory_fraction() * total - used
    return max(0, int(min(free + torch.cuda.memory_reserved() - used, left)))


def is_out_of_memory(error: Exception) -> bool:
    """On a GPU torch raises OutOfMemoryError. On a CPU its allocator raises a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def device_memory(device: str) -> Memory:
    """The memory of the device that an engine's facts name."""
    return GpuMemory() if device == "cuda" else CpuMemory()
