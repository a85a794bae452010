"""Ray and Serve, started on this machine or joined where they run, and what happens there while models load."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray import serve
from ray._private import node
from ray.serve._private import api
from ray.serve.config import ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema

from serve.actors import NAMESPACE
from serve.board import NAME, Replica, board
from serve.config_file import ConfigFile
from serve.lanes import admission
from serve.lean_node import LeanNode
from serve.strict import SettingsError
from serve.watch import CONSTRUCTOR_TRIES

OBJECT_STORE_BYTES = 256 * 2**20
"""Requests travel between replicas by gRPC; Ray's object store holds next to nothing."""
POLL_S = 0.5
STATUS_S = 0.5
ANNOUNCE_S, LEAVE_S = 2.0, 0.5
"""How long telling the ingresses of a stop may take, and what they have for taking leave."""
LONGEST_REASON = 1000
CODE = "DURE_CODE"
"""A variable of all replicas' environment."""


@dataclass(frozen=True)
class Event:
    """Something to tell the person who waits: a stage, a replica's progress, or the end."""

    kind: Literal["stage", "progress", "ready", "failed"]
    message: str
    model: str = ""
    progress: float = 0.0


def start() -> None:
    """Start Ray on this machine alone."""
    _quiet()
    node.Node = LeanNode
    ray.init(
        address="local",
        namespace="serve",
        num_cpus=max(2, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
    )


def connect() -> None:
    """Join the cluster at RAY_ADDRESS. Raises SettingsError where there is none."""
    _quiet()
    if ray.is_initialized():
        return
    if not os.environ.get("RAY_ADDRESS"):  # Ray would start one of its own
        raise SettingsError("this is for a cluster: set RAY_ADDRESS to where its head listens, as 127.0.0.1:6379")
    try:
        ray.init(namespace="serve", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SettingsError(f"no Ray cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {error}") from error


def deploy(config: ConfigFile, log_folder: Path | None = None, code: str = "") -> None:
    """Start Serve where it does not run, and apply the config file; returns before anything is loaded. What runs `code`
    of another version is replaced, though its settings are the same.
    """
    document = dict(config.document)
    if log_folder is not None:
        document["logging_config"] = {**document["logging_config"], "logs_dir": str(log_folder)}
    if code:
        document["applications"] = [_of_version(application, code) for application in document["applications"]]
    schema = ServeDeploySchema.model_validate(document)
    client = api.serve_start(
        http_options=schema.http_options.model_dump(),
        proxy_location=schema.proxy_location or ProxyLocation.EveryNode,
        global_logging_config=schema.logging_config,
    )
    client.deploy_apps(schema, _blocking=False)


def _of_version(application: dict[str, Any], code: str) -> dict[str, Any]:
    """A process is never one that has run with another environment, so it has imported nothing of another version."""
    environment = application.get("runtime_env") or {}
    variables = (environment.get("env_vars") or {}) | {CODE: code}
    return application | {"runtime_env": environment | {"env_vars": variables}}


def renew() -> None:
    """Let the board and admission begin anew, with the code that is there now; they lose nothing that others know."""
    for name in (NAME, admission.NAME):
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, NAMESPACE), no_restart=False)


def follow(config: ConfigFile, is_over: Callable[[], bool] = lambda: False) -> Iterator[Event]:
    """What happens from the deployment on, ending with `ready` or `failed`, or soon after `is_over` says so: a model
    that loads may have nothing to tell for long."""
    yield Event("stage", "Building the graph")
    actor = board()
    epoch, sequence, heard = "", 0, None
    replicas: dict[Any, Replica] = {}
    before: set[Any] = set()
    checked = 0.0
    said = ""
    while not is_over():
        heard = heard or actor.listen.remote(epoch, sequence)
        if ray.wait([heard], timeout=POLL_S)[0]:
            changes = ray.get(heard)
            if not epoch:  # what failed before this deploy is not of it
                before = {key for key, replica in changes.states if replica and replica.event.status == "failed"}
            heard, epoch, sequence = None, changes.epoch, changes.sequence
            for key, replica in changes.states:
                if replica is None:
                    replicas.pop(key, None)
                    continue
                if key in before:
                    continue
                replicas[key] = replica
                yield Event("progress", replica.event.message, replica.model, replica.event.progress)
        for model in config.settings.models:
            failures = [r for r in replicas.values() if r.model == model and r.event.status == "failed"]
            if len(failures) >= CONSTRUCTOR_TRIES:
                yield Event("failed", f"model {model}: {failures[-1].event.message}", model)
                return
        if time.monotonic() - checked < STATUS_S:
            continue
        checked = time.monotonic()
        status, message = _application()
        if status == "DEPLOY_FAILED":
            yield Event("failed", message)
            return
        if status == "RUNNING":
            yield Event("ready", "Ready")
            return
        if message and message != said:
            said = message
            yield Event("stage", message)


def stop() -> None:
    """Let requests finish as long as the config allows, then end Serve and Ray."""
    try:
        _announce_stop()
        with contextlib.suppress(RayServeException, TimeoutError):  # it may not run yet, or take too long
            serve.delete("dure")  # a shutdown alone ends the proxies at once, and with them all that is under way
        serve.shutdown()
    finally:
        ray.shutdown()


def delete() -> bool:
    """Take Dure off a cluster that it shares with others; False where it is not there."""
    found = "dure" in serve.status().applications
    if found:
        _announce_stop()
        serve.delete("dure")
    for name in (NAME, admission.NAME):
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, NAMESPACE))
    return found


def _announce_stop() -> None:
    """Let ingresses take leave of those who are connected, as long as there is a way to them."""
    with contextlib.suppress(Exception):  # a board that can't be reached must not hold up the end
        ray.get(ray.get_actor(NAME, NAMESPACE).stop.remote(), timeout=ANNOUNCE_S)
        time.sleep(LEAVE_S)


def _application() -> tuple[str, str]:
    """The application's status in Serve's words, and the last of what Serve says about it."""
    application = serve.status().applications.get("dure")
    if application is None:
        return "NOT_STARTED", ""
    messages = [application.message, *(deployment.message for deployment in application.deployments.values())]
    message = next((message for message in messages if message), "")
    return application.status.value, (message.strip().splitlines() or [""])[-1][:LONGEST_REASON]


def _quiet() -> None:
    """Ray's and Serve's remarks on starting go to their logs; the terminal is for progress."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
