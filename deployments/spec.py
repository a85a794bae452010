"""What a replica knows about the model it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Precision = Literal["auto", "fp32", "fp16", "bf16", "int8", "int4"]
Runtime = Literal["auto", "torch", "openvino"]
Batches = Literal["mixed", "equal_lengths", "single"]
"""Which items may share a batch: any, only those of equal length, or none."""


@dataclass(frozen=True)
class Upstream:
    """Another server that loads and runs a chat model."""

    kind: Literal["ollama", "openai"]
    url: str
    """Without /v1 or /api."""
    model: str
    """What it calls the model."""
    key_env: str = ""
    """The environment variable that has the key for it. Empty: it needs none."""
    timeout_s: float = 60.0
    """Longest time in which it sends nothing."""
    max_concurrent: int = 5


@dataclass(frozen=True)
class ModelSpec:
    """One model of the config file, resolved as far as possible without reading weights."""

    name: str
    task: str
    """What the model is for, or `MODULE:CLASS` of an engine outside Dure."""
    source: str
    """A folder below the project's root, an absolute folder, `package:IMPORT_NAME/FOLDER` or a hub id."""
    revision: str | None = None
    precision: Precision = "auto"
    runtime: Runtime = "auto"
    """What runs the model: torch, or OpenVINO on a CPU. `auto` takes the one that measures faster."""
    threads: int | None = None
    """CPU threads for one batch; None: all cores."""
    own_cores: bool = False
    """The machine has enough cores for the threads of all models at once."""
    gpu_share: float = 0
    """Fraction of one GPU's memory this replica may use."""
    device_map: str | None = None
    """How accelerate spreads the model over several GPUs; None: it runs on one device."""
    max_memory: dict[int | str, str] | None = None
    """Memory that the spread model may use on each GPU, and on the `cpu`."""
    engine: str = ""
    """MODULE:CLASS of the engine. If empty, `task` is that."""
    footprint: str = ""
    """MODULE:FUNCTION that works out a replica's GPU memory, from this spec and the checkpoint's folder. Empty if there
    is none."""
    prefix_cache_mb: float = 256
    """Memory for the prefix cache, which keeps keys and values of earlier prompts."""
    kv_cache_mb: float = 2048
    """Memory for the keys and values of answers under way, where an engine holds to a budget."""
    max_batch_items: int = 32
    max_batch_tokens: int = 16384
    """Padded tokens of one batch: number of items times length of the longest."""
    deploy: str = ""
    """Identifies the deploy."""
    upstream: Upstream | None = None
    """The server that runs the model in place of an engine here."""


@dataclass(frozen=True)
class Order:
    """Order to reload a model with some fields of its spec changed until the next deploy."""

    number: int
    deploy: str
    changes: dict[str, Any]

    def applied_to(self, spec: ModelSpec) -> ModelSpec:
        return replace(spec, **self.changes)


class CheckpointError(Exception):
    """A checkpoint can't be loaded. The message names the file or setting at fault. Retrying never helps."""


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


class ItemError(Exception):
    """The model can't take an item. The message says what to change; `field` names the part of the request."""

    def __init__(self, message: str, field: str | None = None, code: str | None = None) -> None:
        """`code` is what OpenAI's clients tell such errors by."""
        super().__init__(message)
        self.field = field
        self.code = code


@dataclass(frozen=True)
class Facts:
    """How a model was actually loaded."""

    device: str
    precision: str
    quantized: bool
    weights_bytes: int
    fallback_reason: str | None = None
    runtime: str = "torch"
    quality: dict[str, Any] | None = None
    """How close the answers are to the original's in fp32, and all measurements; None if nothing was measured."""
    batches: Batches = "mixed"
