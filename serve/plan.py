"""Where a config's replicas go on GPUs, and whether they fit: `dure plan`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from deployments.footprint import Footprint, footprint
from deployments.sources import resolve
from deployments.spec import ModelSpec
from serve.settings import Settings, SettingsError

GIB = 2**30
STEP = 0.01
"""Fractions are rounded up to it."""
USABLE = 0.97
"""Of a GPU's memory: the rest goes to its driver."""


@dataclass(frozen=True)
class Need:
    """What each of a model's replicas takes, and what it has booked."""

    model: str
    replicas: int
    footprint: Footprint
    booked: float
    """Share of a GPU."""
    spec: ModelSpec

    def least(self, gpu_bytes: float) -> float:
        """The share that would do, rounded up."""
        return math.ceil(self.footprint.total / gpu_bytes / STEP - 1e-9) * STEP


@dataclass
class Gpu:
    number: int
    memory_bytes: float
    replicas: list[Need] = field(default_factory=list)

    @property
    def free(self) -> float:
        """The share that nobody has booked."""
        return 1 - sum(need.booked for need in self.replicas)


@dataclass
class Plan:
    needs: list[Need]
    gpus: list[Gpu]
    problems: list[str] = field(default_factory=list)
    """What does not fit, by how much, and what would make it fit."""


def gpus_of(text: str) -> list[Gpu]:
    """GPUs written as COUNTxSIZE, such as 2x24GiB. Raises SettingsError."""
    found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)\s*(GiB|GB)", text.strip(), re.IGNORECASE)
    if not found or not int(found[1]) or not float(found[2]):
        raise SettingsError(f"--gpus {text!r}: GPUs are written as COUNTxSIZE, such as 2x24GiB or 1x80GB")
    unit = GIB if found[3].lower() == "gib" else 10**9
    return [Gpu(number, USABLE * float(found[2]) * unit) for number in range(int(found[1]))]


def needs_of(settings: Settings) -> list[Need]:
    """What the models that use a GPU take; nothing is fetched for it.

    Raises CheckpointError where one's config or headers can't be read, or a hub's model is not cached here.
    """
    return [
        Need(
            name,
            model.autoscaling.max_replicas,
            footprint(model.spec(name), resolve(model.source, model.revision, download=False)),
            model.num_gpus,
            model.spec(name),
        )
        for name, model in settings.models.items()
        if model.num_gpus
    ]


def plan(needs: list[Need], gpus: list[Gpu]) -> Plan:
    """Place the largest replicas first, each where the least is left that will do."""
    made = Plan(needs, gpus)
    size = min(gpu.memory_bytes for gpu in gpus)
    for need in needs:
        if need.footprint.total > need.booked * size:
            made.problems.append(
                f"{need.model} books {need.booked:g} of a GPU, {gib(need.booked * size)}, and takes "
                f"{gib(need.footprint.total)}: {gib(need.footprint.total - need.booked * size)} too much; "
                f"{_remedy(need, need.booked * size)}"
            )
    for need in sorted(needs, key=lambda need: -need.booked):
        for number in range(need.replicas):
            fitting = [gpu for gpu in gpus if gpu.free >= need.booked - 1e-9]
            if fitting:
                min(fitting, key=lambda gpu: gpu.free).replicas.append(need)
                continue
            room = max(gpu.free for gpu in gpus) * size
            made.problems.append(
                f"{need.model}, replica {number + 1} of {need.replicas}, has no place: it books "
                f"{gib(need.booked * size)}, and the emptiest GPU has {gib(room)} left, "
                f"{gib(need.booked * size - room)} too little; {_remedy(need, room)}, and num_gpus: "
                f"{math.floor(room / size / STEP) * STEP:.2f}"
            )
    return made


def _remedy(need: Need, room: float) -> str:
    """The mildest change to this model that would make it fit into so many bytes."""
    folder = resolve(need.spec.source, need.spec.revision, download=False)
    for change in _changes(need.spec):
        if footprint(replace(need.spec, **change), folder).total <= room:
            return f"it fits with {', '.join(f'{name}: {value}' for name, value in change.items())}"
    return f"nothing of its own makes it fit; it needs a GPU with {gib(need.footprint.total)} to spare"


def _changes(spec: ModelSpec) -> Iterator[dict[str, Any]]:
    """Of its settings, the mildest first."""
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
