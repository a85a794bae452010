"""What a replica is told about the model it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Precision = Literal["auto", "fp32", "fp16", "bf16", "int8", "int4"]
Runtime = Literal["auto", "torch", "openvino"]


@dataclass(frozen=True)
class ModelSpec:
    """One model of the config file, resolved as far as it can be without reading weights."""

    name: str
    task: str
    """What the model is for, or `MODULE:CLASS` of an engine outside Dure."""
    source: str
    """A folder below the project's root, an absolute folder, `package:IMPORT_NAME/FOLDER` or a hub id."""
    revision: str | None = None
    precision: Precision = "auto"
    runtime: Runtime = "auto"
    """What multiplies: torch, or OpenVINO on a CPU; with `auto` what measures faster."""
    threads: int | None = None
    """CPU threads for one batch; all cores where left out."""
    own_cores: bool = False
    """There are enough cores for the threads of all models at once."""
    gpu_share: float = 0
    """Of one GPU's memory, that a replica may take; what other replicas have is theirs."""
    device_map: str | None = None
    """How a model is spread over several GPUs, as accelerate understands it; None: it has one device."""
    max_memory: dict[int | str, str] | None = None
    """Of each GPU, and of the `cpu`, that it may be spread over."""
    engine: str = ""
    """MODULE:CLASS of the engine. If empty, `task` is that."""
    footprint: str = ""
    """MODULE:FUNCTION that works out the GPU memory of a replica, from this spec and the checkpoint's folder. Empty if
    nothing is known about it."""
    prefix_cache_mb: float = 256
    """For what was read of prompts that others may begin with."""
    max_batch_items: int = 32
    max_batch_tokens: int = 16384
    """Padded tokens of one batch: its items times the longest."""
    deploy: str = ""
    """Tells one deploy from the next."""


@dataclass(frozen=True)
class Order:
    """Load a model anew, with some fields of its spec changed until the next deploy."""

    number: int
    deploy: str
    changes: dict[str, Any]

    def applied_to(self, spec: ModelSpec) -> ModelSpec:
        return replace(spec, **self.changes)


class CheckpointError(Exception):
    """A checkpoint that can't be loaded: the message names the file or setting at fault. Never helped by a retry."""


def first_line(error: BaseException) -> str:
    """What kind of error it is and the first line of what it says."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


class ItemError(Exception):
    """An item that the model can't take. The message says what to change, `field` in which part of the request."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Facts:
    """What became of a model once it was loaded."""

    device: str
    precision: str
    quantized: bool
    weights_bytes: int
    fallback_reason: str | None = None
    runtime: str = "torch"
    quality: dict[str, Any] | None = None
    """How near the answers are to those of the original in fp32, and what was measured; None where nothing was."""
