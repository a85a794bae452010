"""Plans where a config's replicas go on GPUs, and whether they fit: `dure plan`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deployments.checkpoints.footprint import Footprint, footprint
from deployments.checkpoints.sources import described
from deployments.spec import CheckpointError, ModelSpec
from serve.config.base import SettingsError
from serve.config.gpus import GIB, Gpus
from serve.config.model import ModelSettings
from serve.config.settings import Settings
from serve.config.tasks import task_of
from serve.planning.placement import TOLERANCE, Booking, Gpu, place

STEP = 0.01
"""Shares are rounded up to a multiple of this."""
DEFAULT_GPUS = "1x24GiB"


@dataclass(frozen=True)
class Need(Booking):
    """A booking, with the footprint of each replica."""

    footprint: Footprint
    spec: ModelSpec

    def least(self, gpu_bytes: float) -> float:
        """The smallest sufficient share of a GPU of this size."""
        return least(self.footprint, gpu_bytes)


def least(takes: Footprint, gpu_bytes: float) -> float:
    """The smallest share of a GPU that holds the footprint, rounded up to STEP."""
    return round(math.ceil(takes.total / gpu_bytes / STEP - TOLERANCE) * STEP, 2)


@dataclass
class Plan:
    needs: Sequence[Booking]
    gpus: list[Gpu]
    problems: list[str]
    """One message per misfit: what does not fit, by how much, and what would make it fit."""


def gpus_of(text: str) -> list[Gpu]:
    """Parse GPUs written as COUNTxSIZE, such as 2x24GiB. Raises SettingsError."""
    try:
        gpus = Gpus.parse(text)
    except ValueError as error:
        raise SettingsError(f"--gpus {text!r}: {error}") from error
    return [Gpu(number, gpus.memory_bytes) for number in range(gpus.count)]


def with_shares(settings: Settings) -> Settings:
    """Give each model that leaves out its share the smallest sufficient one, if the settings name the GPUs.

    No weights are fetched. Raises SettingsError if a share cannot be worked out or is more than a whole GPU.
    """
    models = dict(settings.models)
    for name, model in settings.models.items():
        if settings.leaves_out(model):
            try:
                need = _need(name, model, settings)
            except CheckpointError as error:
                raise SettingsError(str(error)) from error
            if need.booked > 1:
                size = Gpus.parse(settings.gpus or "").memory_bytes
                raise SettingsError(
                    f"{name} needs {gib(need.footprint.total)}, but a GPU of gpus: {settings.gpus} has {gib(size)}; "
                    f"{_remedy(need, size)}"
                )
            models[name] = model.model_copy(update={"num_gpus": need.booked})
    return settings.model_copy(update={"models": models})


def needs_of(settings: Settings) -> list[Booking]:
    """What the models on GPUs need. For an engine without a known footprint, only its booking. No weights are fetched.

    Raises CheckpointError if a model's config or headers are unavailable.
    """
    return [
        Booking(name, model.autoscaling.max_replicas, model.gpu_share)
        if model.gpu_share and not task_of(model.task).footprint
        else _need(name, model, settings)
        for name, model in settings.models.items()
        if model.gpu_share or settings.leaves_out(model)
    ]


def _need(name: str, model: ModelSettings, settings: Settings) -> Need:
    spec = model.spec(name)
    try:
        takes = footprint(spec, described(model.source, model.revision))
    except CheckpointError as error:
        raise CheckpointError(f"the GPU memory that {name} needs can't be worked out: {error}") from error
    worked_out = settings.leaves_out(model)
    booked = least(takes, Gpus.parse(settings.gpus or "").memory_bytes) if worked_out else model.gpu_share
    return Need(name, model.autoscaling.max_replicas, booked, takes, spec, worked_out=worked_out)


def plan_for(settings: Settings, gpus: str | None) -> Plan:
    """The plan for `gpus`, or else for those in the settings. Shares that are left out refer to the same GPUs.

    Raises SettingsError and CheckpointError.
    """
    gpus = gpus or settings.gpus or DEFAULT_GPUS
    places = gpus_of(gpus)
    there = settings.model_copy(update={"gpus": gpus}) if settings.gpus else settings
    return plan(needs_of(there), places)


def plan(needs: Sequence[Booking], gpus: list[Gpu]) -> Plan:
    """Place all replicas on the GPUs and list what does not fit."""
    size = min(gpu.memory_bytes for gpu in gpus)
    problems = [_overrun(need, size) for need in needs if isinstance(need, Need) and not need.worked_out]
    problems += [_homeless(each, number, gpus, size) for each, number in place(needs, gpus)]
    return Plan(needs, gpus, [problem for problem in problems if problem])


def _overrun(need: Need, size: float) -> str | None:
    """The problem if a model needs more than it books on GPUs of this size, else None."""
    used = need.gpus if need.spec.device_map else 1
    room = min(need.booked, used) * size
    contexts = (used - 1) * need.footprint.context  # the footprint counts one
    takes = need.footprint.total + contexts
    if takes <= room:
        return None
    books = f"{need.booked:g} of a GPU" if used == 1 else f"{used} GPUs"
    more = [f"num_gpus: {need.least(size):.2f}"] if used == 1 and takes <= size else []
    return (
        f"{need.model} books {books}, {gib(room)}, but needs {gib(takes)}: {gib(takes - room)} too much; "
        f"{_remedy(need, room - contexts, *more)}"
    )


def _homeless(booking: Booking, number: int, gpus: list[Gpu], size: float) -> str:
    """The problem of a replica that does not fit: how much memory it lacks, and what would help."""
    lack = f"{booking.model}, replica {number} of {booking.replicas}, does not fit: it books "
    if booking.gpus > 1:
        empty = sum(gpu.free >= 1 - TOLERANCE for gpu in gpus)
        return f"{lack}{booking.gpus} whole GPUs; empty: {empty} of {len(gpus)}"
    left = max(gpu.free for gpu in gpus)
    lack += (
        f"{gib(booking.booked * size)}, but the emptiest GPU has {gib(left * size)} left, "
        f"{gib((booking.booked - left) * size)} too little"
    )
    if not isinstance(booking, Need):
        return lack
    share = math.floor(left / STEP + TOLERANCE) * STEP  # rounded down to what can be booked
    if booking.least(size) <= share + TOLERANCE:
        return f"{lack}; it fits with num_gpus: {booking.least(size):.2f}"
    beside = "" if booking.worked_out else f", and num_gpus: {share:.2f}"
    return f"{lack}; {_remedy(booking, share * size, beside=beside)}"


def _remedy(need: Need, room: float, *remedies: str, beside: str = "") -> str:
    """What would make the model fit into `room` bytes: the given `remedies`, and the mildest change of its settings.

    `beside` is what that change needs in addition.
    """
    if change := _mildest(need, room):
        remedies = (*remedies, change + beside)
    if remedies:
        return f"it fits with {', or with '.join(remedies)}"
    return f"no setting of the model makes it fit; it needs a GPU with {gib(need.footprint.total)} free"


def _mildest(need: Need, room: float) -> str | None:
    folder = described(need.spec.source, need.spec.revision)
    for change in _changes(need.spec):
        if footprint(replace(need.spec, **change), folder).total <= room:
            return ", ".join(f"{name}: {value}" for name, value in change.items())
    return None


def _changes(spec: ModelSpec) -> Iterator[dict[str, Any]]:
    """Changes of a model's settings that save memory, mildest first."""
    smaller = {"fp32": ["fp16", "int8", "int4"], "int8": ["int4"], "int4": []}.get(spec.precision, ["int8", "int4"])
    precisions = smaller if spec.task == "vision" else []
    yield {"prefix_cache_mb": 0}
    for by in (2, 4, 8, 16):
        less = {
            "max_batch_items": max(1, spec.max_batch_items // by),
            "max_batch_tokens": max(1, spec.max_batch_tokens // by),
            "prefix_cache_mb": 0,
        }
        yield less
        if by == 4:
            yield from ({"precision": precision} for precision in precisions)
            yield from ({"precision": precision} | less for precision in precisions)


def gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"
