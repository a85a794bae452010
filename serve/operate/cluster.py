"""Starts Ray and Serve on this machine or joins a running cluster, and reports what happens while models load."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import ray
from ray import serve
from ray._private import node
from ray.serve._private import api
from ray.serve.config import ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatusOverview, ServeDeploySchema

from serve.actors import NAMESPACE
from serve.board.actor import NAME, board
from serve.board.reports import CONSTRUCTOR_TRIES, DIED, Changes, Key, Replica
from serve.config.base import SettingsError
from serve.config.file import ConfigFile
from serve.failures import CONFIG, MACHINE, MachineError, one_line
from serve.operate import environment
from serve.operate.lean_node import LeanNode
from serve.operate.start_events import StartEvent
from serve.queues import admission

OBJECT_STORE_BYTES = 256 * 2**20
"""Requests travel between replicas over gRPC, so Ray's object store stays almost empty."""
CONNECT_S = 5.0
POLL_S = 0.5
STATUS_S = 0.5
ANNOUNCE_S, LEAVE_S = 2.0, 0.5
"""Longest time to tell the ingresses of a stop, and the time they then get to say goodbye to their clients."""
FRAME = 'File "'
"""A message with this in it contains a traceback."""
OWN_ERRORS = re.compile(r"^(deployments|serve)\.[\w.]+: ")
"""Class names of Dure's own exceptions; their messages say enough without them."""
CODE = "DURE_CODE"
"""Environment variable of all replicas: the version of the code they run."""


def start() -> None:
    """Start Ray on this machine alone."""
    _quiet()
    node.Node = LeanNode
    ray.init(
        address="local",
        namespace="serve",
        num_cpus=environment.cpus(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
    )


def connect() -> None:
    """Join the cluster at RAY_ADDRESS. Raises SettingsError if it names none, MachineError if none answers."""
    _quiet()
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address or address == "local":  # Ray would start a cluster of its own
        raise SettingsError("this command needs a cluster: set RAY_ADDRESS to its head, such as 127.0.0.1:6379")
    try:
        if "://" not in address and address != "auto" and os.environ.get("RAY_USE_TLS") != "1":
            grpc.channel_ready_future(grpc.insecure_channel(address)).result(CONNECT_S)  # Ray retries for minutes
        ray.init(namespace="serve", log_to_driver=False, logging_level=logging.ERROR)
    except grpc.FutureTimeoutError as error:
        raise MachineError(f"no Ray cluster answers at RAY_ADDRESS={address}") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise MachineError(f"no Ray cluster at RAY_ADDRESS={address}: {one_line(str(error))}") from error


def deploy(config: ConfigFile, log_folder: Path | None = None, code: str = "") -> None:
    """Start Serve unless it runs, and apply the config file. Returns before anything is loaded.

    Replicas of another `code` version are replaced even if their settings have not changed.
    """
    where = {"host": config.host, "port": config.port}  # Serve's default host is every address
    document = config.document | {"http_options": config.document.get("http_options", {}) | where}
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
    """Put the code version into the environment. Ray reuses a process only for the same environment, so none has
    modules of another version imported."""
    runtime_env = application.get("runtime_env") or {}
    variables = (runtime_env.get("env_vars") or {}) | {CODE: code}
    return application | {"runtime_env": runtime_env | {"env_vars": variables}}


def renew() -> None:
    """Restart the board and admission with the current code. They lose nothing: other processes repeat their state."""
    for name in (NAME, admission.NAME):
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, NAMESPACE), no_restart=False)


def follow(config: ConfigFile, is_over: Callable[[], bool] = lambda: False) -> Iterator[StartEvent]:
    """Yield the events of a deploy, up to `ready` or `failed`. Ends early, soon after `is_over` returns True, because
    a loading model may report nothing for a long time."""
    yield StartEvent("stage", "Building the graph")
    replicas = _Replicas()
    checked, said = 0.0, ""
    while not is_over():
        for replica in replicas.changes():
            again = replica.event.status == "failed"
            message = "failed; trying once more" if again else replica.event.message
            if not again or len(replicas.failures(replica.model)) < CONSTRUCTOR_TRIES:
                yield StartEvent("progress", message, replica.model, replica.event.progress)
        failed = [name for name in config.settings.models if len(replicas.failures(name)) >= CONSTRUCTOR_TRIES]
        if failed:
            yield _failure_of(failed[0], replicas.failures(failed[0])[-1])
            return
        if time.monotonic() - checked < STATUS_S:
            continue
        checked = time.monotonic()
        application = serve.status().applications.get("dure")
        if application is None:
            continue
        if application.status == "DEPLOY_FAILED":
            yield _failure(application, config.settings.models)
            return
        if application.status == "RUNNING":
            yield StartEvent("ready", "Ready")
            return
        message = _obstacle(application)
        if message and message != said:
            said = message
            yield StartEvent("stage", message)


class _Replicas:
    """What the board has reported about replicas since this deploy."""

    def __init__(self) -> None:
        self.board = board()
        self.epoch, self.sequence = "", 0
        self.heard: Any = None
        self.before: set[Key] = set()
        """Replicas that failed before this deploy."""
        self.known: dict[Key, Replica] = {}

    def changes(self) -> Iterator[Replica]:
        """Replicas whose state has changed; waits up to POLL_S for a change."""
        self.heard = self.heard or self.board.listen.remote(self.epoch, self.sequence)
        if not ray.wait([self.heard], timeout=POLL_S)[0]:
            return
        changes: Changes = ray.get(self.heard)
        if not self.epoch:
            self.before = {key for key, replica in changes.states if replica and replica.event.status == "failed"}
        self.heard, self.epoch, self.sequence = None, changes.epoch, changes.sequence
        for key, replica in changes.states:
            if replica is None:
                self.known.pop(key, None)
            elif key not in self.before:
                self.known[key] = replica
                yield replica

    def failures(self, model: str) -> list[str]:
        """Why replicas of the model failed, one reason for each."""
        failed = [each for each in self.known.values() if each.model == model and each.event.status == "failed"]
        return [each.event.message.removeprefix("Failed: ") for each in failed]


def _failure_of(model: str, reason: str) -> StartEvent:
    """The failure of a model whose replicas reported why they could not load it, or died without a report."""
    code = MACHINE if reason == DIED else CONFIG
    return StartEvent("failed", f"model {model}: {one_line(reason)}", model, code=code)


def _failure(application: ApplicationStatusOverview, models: Container[str]) -> StartEvent:
    """The failure of an application: a deployment failed, or the graph could not be built.

    An exception raised by the application's code counts as a fault of the config.
    """
    deployments = application.deployments.items()
    failed = [(name, each.message) for name, each in deployments if each.status == "DEPLOY_FAILED"]
    name, message = failed[0] if failed else ("", application.message)
    said = OWN_ERRORS.sub("", one_line(message))
    if FRAME not in message and failed:
        said = f"its process died while it started, {CONSTRUCTOR_TRIES} times; was there enough memory?"
    code = CONFIG if FRAME in message else MACHINE
    kind = "model" if name in models else "deployment"
    return StartEvent("failed", f"{kind} {name}: {said}" if name else said, name, code=code)


def _obstacle(application: ApplicationStatusOverview) -> str:
    """What replicas wait for, according to Serve; empty if one failed, because it reports the reason itself."""
    for name, each in application.deployments.items():
        if "Error:" in each.message:
            return "" if FRAME in each.message else f"{name}: its process died; starting it once more"
        if each.message:
            return one_line(each.message)
    return one_line(application.message)


def stop() -> None:
    """Let requests finish for as long as the config allows, then end Serve and Ray."""
    try:
        _announce_stop()
        with contextlib.suppress(RayServeException, TimeoutError):  # it may not run yet, or take too long
            serve.delete("dure")  # a shutdown alone ends the proxies at once, and with them all requests in flight
        serve.shutdown()
    finally:
        ray.shutdown()


def delete() -> bool:
    """Take Dure off a cluster that it shares with others; False if it is not there."""
    found = "dure" in serve.status().applications
    if found:
        _announce_stop()
        serve.delete("dure")
    for name in (NAME, admission.NAME):
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, NAMESPACE))
    return found


def _announce_stop() -> None:
    """Let ingresses say goodbye to connected clients while the clients can still be reached."""
    with contextlib.suppress(Exception):  # an unreachable board must not delay the stop
        ray.get(ray.get_actor(NAME, NAMESPACE).stop.remote(), timeout=ANNOUNCE_S)
        time.sleep(LEAVE_S)


def _quiet() -> None:
    """Keep Ray's and Serve's startup messages out of the terminal, which shows progress; their logs have them."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
