"""Where a config's replicas go on GPUs, and whether they fit: `dure plan`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deployments.footprint import Footprint, footprint
from deployments.sources import NotCached, resolve
from deployments.spec import CheckpointError, ModelSpec
from serve.gpus import GIB, Gpus
from serve.model_settings import ModelSettings
from serve.settings import Settings
from serve.strict import SettingsError

STEP = 0.01
"""Fractions are rounded up to it."""
TOLERANCE = 1e-9
"""Of sums of fractions: 0.33 + 0.56 + 0.11 is more than 1."""
DEFAULT_GPUS = "1x24GiB"


@dataclass(frozen=True)
class Need:
    """What each of a model's replicas takes, and what it has booked."""

    model: str
    replicas: int
    footprint: Footprint
    booked: float
    """Share of a GPU, or how many of them."""
    spec: ModelSpec
    worked_out: bool = False
    """The config leaves it out: `booked` is the least that will do."""

    def least(self, gpu_bytes: float) -> float:
        """The share that would do, rounded up."""
        return least(self.footprint, gpu_bytes)

    @property
    def gpus(self) -> int:
        """That each replica books: a share of one, or several, which Ray gives only whole."""
        return 1 if self.worked_out else max(1, math.ceil(self.booked - TOLERANCE))

    @property
    def on_each(self) -> float:
        """The share that it books of each of them."""
        return 1 if self.gpus > 1 else self.booked


def least(takes: Footprint, gpu_bytes: float) -> float:
    """The share of a GPU that so much memory is, rounded up."""
    return round(math.ceil(takes.total / gpu_bytes / STEP - TOLERANCE) * STEP, 2)


@dataclass
class Gpu:
    number: int
    memory_bytes: float
    replicas: list[Need] = field(default_factory=list)

    @property
    def free(self) -> float:
        """The share that nobody has booked."""
        return 1 - sum(need.on_each for need in self.replicas)


@dataclass
class Plan:
    needs: list[Need]
    gpus: list[Gpu]
    problems: list[str] = field(default_factory=list)
    """What does not fit, by how much, and what would make it fit."""


def gpus_of(text: str) -> list[Gpu]:
    """GPUs written as COUNTxSIZE, such as 2x24GiB. Raises SettingsError."""
    try:
        gpus = Gpus.parse(text)
    except ValueError as error:
        raise SettingsError(f"--gpus {text!r}: {error}") from error
    return [Gpu(number, gpus.memory_bytes) for number in range(gpus.count)]


def with_shares(settings: Settings, file: Path | str = "FILE") -> Settings:
    """Gives each model that leaves its share out the least that will do, where the settings say what GPUs there are.

    Nothing is fetched for it; `file` is named in errors. Raises SettingsError where a share can't be worked out, or is
    more than a GPU.
    """
    models = dict(settings.models)
    for name, model in settings.models.items():
        if settings.leaves_out(model):
            try:
                need = _need(name, model, settings, file)
            except CheckpointError as error:
                raise SettingsError(str(error)) from error
            if need.booked > 1:
                size = Gpus.parse(settings.gpus or "").memory_bytes
                raise SettingsError(
                    f"{name} takes {gib(need.footprint.total)}, and a GPU of gpus: {settings.gpus} has {gib(size)}; "
                    f"{_remedy(need, size)}"
                )
            models[name] = model.model_copy(update={"num_gpus": need.booked})
    return settings.model_copy(update={"models": models})


def needs_of(settings: Settings, file: Path | str = "FILE") -> list[Need]:
    """What the models that use a GPU take; nothing is fetched for it.

    Raises CheckpointError where one's config or headers can't be read, or a hub's model is not cached here.
    """
    return [
        _need(name, model, settings, file)
        for name, model in settings.models.items()
        if model.gpu_share or settings.leaves_out(model)
    ]


def _need(name: str, model: ModelSettings, settings: Settings, file: Path | str) -> Need:
    spec = model.spec(name)
    try:
        takes = footprint(spec, resolve(model.source, model.revision, download=False))
    except CheckpointError as error:
        hint = f"; run `dure fetch -c {file}` first" if isinstance(error, NotCached) else ""
        raise CheckpointError(f"what {name} takes of a GPU can't be worked out: {error}{hint}") from error
    worked_out = settings.leaves_out(model)
    booked = least(takes, Gpus.parse(settings.gpus or "").memory_bytes) if worked_out else model.gpu_share
    return Need(name, model.autoscaling.max_replicas, takes, booked, spec, worked_out)


def plan_for(settings: Settings, gpus: str | None, file: Path | str = "FILE") -> Plan:
    """The plan on `gpus` instead of those that the settings name; shares that are left out are of these, too.

    Raises SettingsError and CheckpointError.
    """
    gpus = gpus or settings.gpus or DEFAULT_GPUS
    places = gpus_of(gpus)
    there = settings.model_copy(update={"gpus": gpus}) if settings.gpus else settings
    return plan(needs_of(there, file), places)


def place(needs: list[Need], gpus: list[Gpu]) -> Iterator[tuple[Need, int]]:
    """Put the largest replicas first, each where the least is left that will do, and one that books several GPUs on
    empty ones. Yields a replica and its number as it turns out to have no place.
    """
    for need in sorted(needs, key=lambda need: -need.booked):
        for number in range(1, need.replicas + 1):
            fitting = sorted((gpu for gpu in gpus if gpu.free >= need.on_each - TOLERANCE), key=lambda gpu: gpu.free)
            if len(fitting) < need.gpus:
                yield need, number
                continue
            for gpu in fitting[: need.gpus]:
                gpu.replicas.append(need)


def plan(needs: list[Need], gpus: list[Gpu]) -> Plan:
    """Place all replicas on the GPUs, and say what keeps any from it."""
    made = Plan(needs, gpus)
    size = min(gpu.memory_bytes for gpu in gpus)
    for need in needs:
        used = need.gpus if need.spec.device_map else 1
        room = min(need.booked, used) * size
        takes = need.footprint.total + (used - 1) * need.footprint.context
        if takes > room and not need.worked_out:
            books = f"{need.booked:g} of a GPU" if used == 1 else f"{used} GPUs"
            more = [f"num_gpus: {need.least(size):.2f}"] if used == 1 and takes <= size else []
            made.problems.append(
                f"{need.model} books {books}, {gib(room)}, and takes {gib(takes)}: {gib(takes - room)} too much; "
                f"{_remedy(need, room - (used - 1) * need.footprint.context, *more)}"
            )
    for need, number in place(needs, gpus):
        lack = f"{need.model}, replica {number} of {need.replicas}, has no place: it books "
        if need.gpus > 1:
            empty = sum(gpu.free >= 1 - TOLERANCE for gpu in gpus)
            made.problems.append(f"{lack}{need.gpus} whole GPUs; empty: {empty} of {len(gpus)}")
            continue
        room = max(gpu.free for gpu in gpus) * size
        share = math.floor(room / size / STEP + TOLERANCE) * STEP  # of what is left, as it can be booked
        if need.least(size) <= share + TOLERANCE:
            remedy = f"it fits with num_gpus: {need.least(size):.2f}"
        else:
            remedy = _remedy(need, share * size, beside="" if need.worked_out else f", and num_gpus: {share:.2f}")
        made.problems.append(
            f"{lack}{gib(need.booked * size)}, and the emptiest GPU has {gib(room)} left, "
            f"{gib(need.booked * size - room)} too little; {remedy}"
        )
    return made


def _remedy(need: Need, room: float, *remedies: str, beside: str = "") -> str:
    """What would make the model fit into so many bytes: `remedies`, and the mildest change of it with what has to come
    `beside` it.
    """
    if change := _mildest(need, room):
        remedies = (*remedies, change + beside)
    if remedies:
        return f"it fits with {', or with '.join(remedies)}"
    return f"nothing of its own makes it fit; it needs a GPU with {gib(need.footprint.total)} to spare"


def _mildest(need: Need, room: float) -> str | None:
    folder = resolve(need.spec.source, need.spec.revision, download=False)
    for change in _changes(need.spec):
        if footprint(replace(need.spec, **change), folder).total <= room:
            return ", ".join(f"{name}: {value}" for name, value in change.items())
    return None


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
