"""Ray and Serve, started on this machine or joined where they run, and what happens there while models load."""

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
from serve.operate.start_events import Event
from serve.queues import admission

OBJECT_STORE_BYTES = 256 * 2**20
"""Requests travel between replicas by gRPC; Ray's object store holds next to nothing."""
CONNECT_S = 5.0
POLL_S = 0.5
STATUS_S = 0.5
ANNOUNCE_S, LEAVE_S = 2.0, 0.5
"""How long telling the ingresses of a stop may take, and what they have for taking leave."""
FRAME = 'File "'
"""Is in an exception's traceback."""
OWN_ERRORS = re.compile(r"^(deployments|serve)\.[\w.]+: ")
"""Names of Dure's exceptions, which say what is wrong by themselves."""
CODE = "DURE_CODE"
"""A variable of all replicas' environment."""


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
    """Join the cluster at RAY_ADDRESS. Raises SettingsError where it names none, MachineError where none answers."""
    _quiet()
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address or address == "local":  # Ray would start one of its own
        raise SettingsError("this is for a cluster: set RAY_ADDRESS to where its head listens, as 127.0.0.1:6379")
    try:
        if "://" not in address and address != "auto" and os.environ.get("RAY_USE_TLS") != "1":
            grpc.channel_ready_future(grpc.insecure_channel(address)).result(CONNECT_S)  # Ray tries for minutes
        ray.init(namespace="serve", log_to_driver=False, logging_level=logging.ERROR)
    except grpc.FutureTimeoutError as error:
        raise MachineError(f"no Ray cluster answers at RAY_ADDRESS={address}") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise MachineError(f"no Ray cluster at RAY_ADDRESS={address}: {one_line(str(error))}") from error


def deploy(config: ConfigFile, log_folder: Path | None = None, code: str = "") -> None:
    """Start Serve where it does not run, and apply the config file; returns before anything is loaded. What runs `code`
    of another version is replaced, though its settings are the same.
    """
    where = {"host": config.host, "port": config.port}  # Serve's own default is all addresses
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
    """A process is never one that has run with another environment, so it has imported nothing of another version."""
    runtime_env = application.get("runtime_env") or {}
    variables = (runtime_env.get("env_vars") or {}) | {CODE: code}
    return application | {"runtime_env": runtime_env | {"env_vars": variables}}


def renew() -> None:
    """Let the board and admission begin anew, with the code that is there now; they lose nothing that others know."""
    for name in (NAME, admission.NAME):
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, NAMESPACE), no_restart=False)


def follow(config: ConfigFile, is_over: Callable[[], bool] = lambda: False) -> Iterator[Event]:
    """What happens from the deployment on, ending with `ready` or `failed`, or soon after `is_over` says so: a model
    that loads may have nothing to tell for long."""
    yield Event("stage", "Building the graph")
    replicas = _Replicas()
    checked, said = 0.0, ""
    while not is_over():
        for replica in replicas.news():
            again = replica.event.status == "failed"
            message = "failed, and is tried once more" if again else replica.event.message
            if not again or len(replicas.failures(replica.model)) < CONSTRUCTOR_TRIES:
                yield Event("progress", message, replica.model, replica.event.progress)
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
            yield Event("ready", "Ready")
            return
        message = _obstacle(application)
        if message and message != said:
            said = message
            yield Event("stage", message)


class _Replicas:
    """What the board has told of replicas since this deploy."""

    def __init__(self) -> None:
        self.board = board()
        self.epoch, self.sequence = "", 0
        self.heard: Any = None
        self.before: set[Key] = set()
        """That failed before this deploy."""
        self.known: dict[Key, Replica] = {}

    def news(self) -> Iterator[Replica]:
        """Those of which there is something new; waits a moment for it."""
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
        """Why its replicas failed, one reason each."""
        failed = [each for each in self.known.values() if each.model == model and each.event.status == "failed"]
        return [each.event.message.removeprefix("Failed: ") for each in failed]


def _failure_of(model: str, reason: str) -> Event:
    """Of a model whose replicas have said why they could not load it, or died without a word."""
    code = MACHINE if reason == DIED else CONFIG
    return Event("failed", f"model {model}: {one_line(reason)}", model, code=code)


def _failure(application: ApplicationStatusOverview, models: Container[str]) -> Event:
    """Of an application that can't be deployed. What was raised by its code is the fault of what the config asks for.

    A deployment failed, or the graph of them could not be built.
    """
    deployments = application.deployments.items()
    failed = [(name, each.message) for name, each in deployments if each.status == "DEPLOY_FAILED"]
    name, message = failed[0] if failed else ("", application.message)
    said = OWN_ERRORS.sub("", one_line(message))
    if FRAME not in message and failed:
        said = f"its process died while it started, {CONSTRUCTOR_TRIES} times; was there memory enough?"
    code = CONFIG if FRAME in message else MACHINE
    kind = "model" if name in models else "deployment"
    return Event("failed", f"{kind} {name}: {said}" if name else said, name, code=code)


def _obstacle(application: ApplicationStatusOverview) -> str:
    """What Serve says that replicas wait for; why they failed they say themselves."""
    for name, each in application.deployments.items():
        if "Error:" in each.message:
            return "" if FRAME in each.message else f"{name}: its process died, and is started once more"
        if each.message:
            return one_line(each.message)
    return one_line(application.message)


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


def _quiet() -> None:
    """Ray's and Serve's remarks on starting go to their logs; the terminal is for progress."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
