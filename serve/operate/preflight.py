"""Checks of a config against this machine, before anything is started."""

from __future__ import annotations

import errno
from pathlib import Path

import fsspec

from deployments.checkpoints.sources import local_path, resolve
from deployments.memory import gpu_count
from deployments.spec import CheckpointError
from serve.config.base import SettingsError
from serve.config.file import ConfigFile
from serve.config.model import optimised
from serve.config.settings import Settings
from serve.operate import environment, processes
from serve.planning.placement import Booking, Gpu, place
from serve.planning.plan import with_shares
from serve.store import locations


def check(config: ConfigFile) -> None:
    """Raises SettingsError if the port is taken, a source is missing, or the machine lacks what the models ask for."""
    check_address(config.host, config.port)
    check_sources(config.settings)
    check_assets(config.settings)
    check_cpus(config.settings)
    check_gpus(config.settings)


def check_address(host: str, port: int) -> None:
    """Check that this machine can listen there."""
    try:
        environment.bind_once(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(
                f"port {port} on {host} is taken by {processes.listener(port)}; stop it (`dure stop` if it is Dure's) "
                "or set http_options.port in the config"
            ) from error
        raise SettingsError(
            f"http_options: this machine can't listen on {host}:{port}: {error.strerror or error}"
        ) from error


def check_sources(settings: Settings) -> None:
    """Check that the models' files are on this machine, or that a revision on the hub is named."""
    optimised()
    for name, model in settings.models.items():
        if model.upstream:
            continue
        try:
            if model.revision is None:
                resolve(model.source, None)
            else:
                local_path(model.source)
        except (CheckpointError, ImportError, OSError) as error:
            raise SettingsError(f"model {name}: {error}") from error


def check_assets(settings: Settings) -> None:
    """Check that the images of adverts can be stored."""
    if not settings.keeps_record:
        return
    place = locations.assets(settings.store)
    try:
        if "://" in place:
            fsspec.get_filesystem_class(place.partition("://")[0])
        else:
            Path(place).mkdir(parents=True, exist_ok=True)
    except (OSError, ImportError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"store.assets: {place}: {reason}") from error


def check_cpus(settings: Settings) -> None:
    """Check that the CPUs suffice for the first replicas, and for any one replica of a model scaled to zero."""
    models = settings.models.values()
    booked = settings.ingress.num_cpus * settings.ingress.replicas
    booked += sum(model.num_cpus * model.autoscaling.min_replicas for model in models)
    for name in settings.active_services:
        booked += settings.service(name).num_cpus * settings.service(name).replicas
    most, have = max(booked, *(model.num_cpus for model in models)), environment.cpus()
    if most > have:
        raise SettingsError(f"the replicas book {most:g} CPUs (num_cpus), but this machine has {have}")


def check_gpus(settings: Settings) -> None:
    """Check that the GPUs have room for the first replicas, and for any one replica of a model scaled to zero."""
    models = with_shares(settings).models
    first = [
        Booking(name, model.autoscaling.min_replicas, model.gpu_share)
        for name, model in models.items()
        if model.gpu_share
    ]
    if not first:
        return
    count = gpu_count()
    without_place = list(place(first, [Gpu(number) for number in range(count)]))
    if without_place or max(booking.gpus for booking in first) > count:
        asked = ", ".join(f"{booking.model} {booking.booked:g} x {booking.replicas}" for booking in first)
        raise SettingsError(f"the models ask for GPUs ({asked}); this machine has {count}, and they don't fit")
