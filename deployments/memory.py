"""The memory that batches are computed in, as far as it limits them."""

from __future__ import annotations

from typing import Protocol


class Memory(Protocol):
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

    def free_bytes(self) -> int | None:
        return None

    def begin(self) -> None: ...

    def batch_bytes(self) -> int:
        return 0

    def release(self) -> None: ...


class GpuMemory:
    """The GPU's, with what torch has set aside and not used counted as free."""

    def __init__(self) -> None:
        self._before = 0

    def free_bytes(self) -> int | None:
        import torch

        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())

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


def device_memory(device: str) -> Memory:
    """The memory of the device that an engine's facts name."""
    return GpuMemory() if device == "cuda" else CpuMemory()
