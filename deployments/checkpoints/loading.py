"""Wraps from_pretrained with progress, precision, fallback, and errors that name the file at fault."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from deployments import disk_cache
from deployments.checkpoints.completeness import Probe, reports, require
from deployments.checkpoints.diagnosis import fault
from deployments.checkpoints.layout import Layout
from deployments.load_progress import LoadProgress
from deployments.spec import CheckpointError, Facts, Precision

logger = logging.getLogger("ray.serve")

Model = TypeVar("Model", bound=nn.Module)

FILE_ERRORS = (OSError, SafetensorError, json.JSONDecodeError, KeyError, EOFError, UnpicklingError)
"""Errors of reading the checkpoint, which quantisation does not cause."""
MACHINE_ERRORS = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
"""Errors that say nothing about the checkpoint: another attempt may succeed."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Placement:
    """Where accelerate puts a model's layers. If `device_map` is None, they all go on `device()`."""

    device_map: str | None = None
    max_memory: dict[int | str, str] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for `from_pretrained`."""
        if self.device_map is None:
            return {}
        return {"device_map": self.device_map} | ({"max_memory": self.max_memory} if self.max_memory else {})


def device() -> torch.device:
    """The GPU that Ray gave this process, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def plain_precision() -> Precision:
    """What `auto` means, and what a failed quantisation falls back to.

    It is half precision if the hardware multiplies it fast, else fp32.
    """
    if torch.cuda.is_available():
        return "fp16"
    return disk_cache.half_precision() or "fp32"


def load_model(
    load: Callable[..., Model],
    folder: Path,
    precision: Precision,
    progress: LoadProgress,
    probe: Probe | None = None,
    quantise: bool = False,
    placement: Placement = Placement(),
) -> tuple[Model, Facts]:
    """Load a model at the requested precision.

    `load(dtype=..., **kwargs)` is a bound `from_pretrained`. `probe` returns the loaded model's output for an example:
    weights missing from the checkpoint are accepted if that output does not depend on them, and never without a probe.
    With `quantise`, bitsandbytes quantises to int8 or int4 while loading. If that fails, the model is loaded in plain
    precision and the facts give the reason. Without `quantise`, int8 is torch's dynamic quantisation of linear layers
    (CPU only). With a `placement`, accelerate spreads the model over devices.

    Raises CheckpointError if files are missing or damaged, or weights are missing or don't fit.
    """
    loading = partial(_complete, load, folder, progress, probe)
    wanted = plain_precision() if precision == "auto" else precision
    reason = None
    if wanted in ("int8", "int4"):
        try:
            if quantise:
                quantised = _bitsandbytes(wanted)
                model = loading(dtype=DTYPES[plain_precision()], quantization_config=quantised, **placement.options)
                return model, _facts(model, wanted)
            if wanted == "int4" or device().type != "cpu":
                raise ValueError(f"{wanted} is not available for this kind of model on {device().type}")
            model = _quantise_dynamically(loading(dtype=torch.float32))
            return model, _facts(model, wanted)
        except CheckpointError:
            raise
        except Exception as error:  # whatever goes wrong in quantisation, plain precision still works
            reason = f"{wanted} failed ({type(error).__name__}: {error}), so {plain_precision()} is served"
            logger.warning(reason)
            wanted = plain_precision()
    model = loading(dtype=DTYPES[wanted], **placement.options)
    if placement.device_map is None:
        model = model.to(device())
    return model, _facts(model, wanted, reason)


def _complete(
    load: Callable[..., Model], folder: Path, progress: LoadProgress, probe: Probe | None, **options: Any
) -> Model:
    """Load the model, ready to run. Raises CheckpointError if the checkpoint lacks a part of it."""
    try:
        with _watched(folder, progress), reports() as found:
            model = load(**options)
    except (CheckpointError, *MACHINE_ERRORS):
        raise
    except Exception as error:  # whatever a loader raises, the checkpoint is at fault
        if "quantization_config" in options and not isinstance(error, FILE_ERRORS):
            raise
        raise fault(folder, error) from error
    model.eval()
    require(model, found, folder, probe)
    return model


def _bitsandbytes(precision: str) -> Any:
    from transformers import BitsAndBytesConfig

    if precision == "int8":
        # It logs a warning at every multiplication, that it casts to fp16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=DTYPES[plain_precision()])


def _quantise_dynamically(model: nn.Module) -> Any:
    import warnings

    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of its deprecation on every call
        return quantize_dynamic(  # type: ignore[no-untyped-call]
            model, {nn.Linear: per_channel_dynamic_qconfig}, dtype=torch.qint8
        )


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all weights, with the scales of those that bitsandbytes quantised.

    Includes linear layers that torch quantised, whose weights are not in `parameters`.
    """
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values()
    total = sum(tensor.nbytes + _scales_bytes(tensor) for tensor in tensors)
    for module in model.modules():
        packed = getattr(module, "_packed_params", None)
        if packed is not None and hasattr(module, "weight") and callable(module.weight):
            weight = module.weight()
            total += weight.numel() * weight.element_size()
    return total


def _scales_bytes(tensor: Any) -> int:
    """Bytes of the scales of a bitsandbytes tensor: one per row in 8 bit, one per block in 4 bit."""
    scales = (getattr(tensor, "SCB", None), getattr(getattr(tensor, "quant_state", None), "absmax", None))
    return sum(each.nbytes for each in scales if each is not None)


def _facts(model: nn.Module, precision: str, reason: str | None = None) -> Facts:
    return Facts(device().type, precision, precision in ("int8", "int4"), weights_bytes(model), reason)


@contextmanager
def _watched(folder: Path, progress: LoadProgress) -> Iterator[None]:
    """Report progress while transformers loads weights from `folder`, by a hook into its own progress bar."""
    layout = Layout.read(folder)

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") == "Loading weights":
            return layout.follow(args[0], progress)
        return factory(*args, **kwargs)

    previous = transformers_logging.set_tqdm_hook(hook)
    try:
        progress.checkpoint(0, 0, len(layout.shards))
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)
