"""One small actor that knows how every replica is; replicas report to it, ingresses listen to it.

A replica's report carries all that it has to say (its progress, its facts, its metrics) and is repeated every second,
so a board that starts anew is complete within a second, and a replica that falls silent is known to be gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray

from deployments.progress import LoadEvent
from deployments.spec import Order
from serve.reloads import Reload, Reloads

logger = logging.getLogger("ray.serve")

NAME, NAMESPACE = "dure-board", "dure"
BEAT_S = 1.0
SILENCE_S = 10.0
"""A replica not heard of for this long is gone: ten beats, as loading may hold the interpreter for seconds."""
LISTEN_S = 5.0
ANSWER_S = 5.0
HISTORY = 4096

Key = tuple[str, str]
"""A model's name and a replica's id."""


@dataclass(frozen=True)
class Replica:
    """How one replica of a model is."""

    model: str
    replica: str
    event: LoadEvent
    facts: dict[str, Any] | None = None
    step: int = 0
    """Counts the replica's reports that say something new: Ray may deliver two of them in the wrong order."""
    process: str = ""
    """The replica that loads a second copy, where this is one; else empty."""
    deploy: str = ""
    order: Order | None = None
    """The last order to reload that it has carried out."""


@dataclass(frozen=True)
class Changes:
    """What a listener has missed: states in order, None where a replica is gone. `whole`: all there is."""

    epoch: str
    sequence: int
    whole: bool
    states: list[tuple[Key, Replica | None]]


class Board:
    def __init__(self) -> None:
        self.epoch = uuid.uuid4().hex
        self.sequence = 0
        self.replicas: dict[Key, Replica] = {}
        self.heard: dict[Key, float] = {}
        self.history: deque[tuple[Key, Replica | None]] = deque(maxlen=HISTORY)
        self.changed = asyncio.Event()
        self.measured: dict[Key, tuple[float, Any]] = {}
        self.reloads: defaultdict[str, Reloads] = defaultdict(Reloads)
        self.sweeping: asyncio.Task[None] | None = None

    async def report(self, replica: Replica) -> Order | None:
        """Take note of how a replica is; answers with what it is to reload, if it is its turn."""
        key = (replica.model, replica.replica)
        self.heard[key] = time.monotonic()
        known = self.replicas.get(key)
        if known is None or replica.step > known.step:
            if replica.event.status == "ready":
                self._forget_failures(replica.model)
            self._note(key, replica)
        if self.sweeping is None:
            self.sweeping = asyncio.create_task(self._sweep())
        if replica.event.status != "ready" or replica.process:
            return None
        return self.reloads[replica.model].ready(
            replica.replica, self.replicas[key].order, self._serving(replica.model)
        )

    async def forget(self, model: str, replica: str) -> None:
        """A second copy has taken the place of the first, whose replica speaks for it from now on."""
        self._note((model, replica), None)

    async def standing(self, model: str, deploy: str) -> Order | None:
        """What a replica that starts now has to load instead of what its config says."""
        return self.reloads[model].started(deploy)

    async def order(self, model: str, changes: dict[str, Any]) -> Order:
        """Have all replicas of a model reload, one after the other. Raises ValueError while they do already."""
        deploys = [replica.deploy for key, replica in self.replicas.items() if key[0] == model]
        return self.reloads[model].order(deploys[-1] if deploys else "", changes)

    async def refused(self, model: str, number: int, reason: str) -> None:
        """A replica could not carry out an order, and serves on as before."""
        self.reloads[model].refused(number, reason)

    async def reload(self, model: str) -> Reload | None:
        """How the model's last order is getting on."""
        return self.reloads[model].latest

    async def measure(self, model: str, replica: str, families: Any) -> None:
        """Take a process's metrics: prometheus_client's families as it collected them."""
        self.measured[model, replica] = (time.monotonic(), families)

    async def metrics(self) -> dict[Key, Any]:
        now = time.monotonic()
        self.measured = {key: value for key, value in self.measured.items() if now - value[0] < SILENCE_S}
        return {key: families for key, (_, families) in self.measured.items()}

    async def listen(self, epoch: str, since: int) -> Changes:
        """What has changed since a sequence number of this epoch; waits a few seconds for something to change."""
        if epoch != self.epoch or self.sequence - since > len(self.history):
            return Changes(self.epoch, self.sequence, True, list(self.replicas.items()))
        if since == self.sequence:
            changed = self.changed
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), LISTEN_S)
        missed = self.sequence - since
        return Changes(self.epoch, self.sequence, False, list(self.history)[len(self.history) - missed :])

    def _serving(self, model: str) -> set[str]:
        """The model's replicas that are ready."""
        return {
            name
            for (of, name), replica in self.replicas.items()
            if of == model and replica.event.status == "ready" and not replica.process
        }

    def _note(self, key: Key, state: Replica | None) -> None:
        if state is None:
            self.replicas.pop(key, None)
            self.heard.pop(key, None)
        else:
            self.replicas[key] = state
        self.sequence += 1
        self.history.append((key, state))
        self.changed.set()
        self.changed = asyncio.Event()

    def _forget_failures(self, model: str) -> None:
        for key, state in list(self.replicas.items()):
            if key[0] == model and state.event.status == "failed":
                self._note(key, None)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            for key, heard in list(self.heard.items()):
                state = self.replicas[key]
                if time.monotonic() - heard < SILENCE_S or state.event.status == "failed":
                    continue
                if state.event.status == "ready":
                    self._note(key, None)
                else:
                    reason = "the process died while loading"
                    event = LoadEvent("failed", state.event.progress, f"Failed: {reason}", f"실패: {reason}")
                    self._note(key, replace(state, event=event))


def board() -> Any:
    """The cluster's board, started where there is none."""
    return (
        ray.remote(Board)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=10_000,
        )
        .remote()
    )


class Reporter:
    """A process's line to the board. Nothing here but `open` waits for an answer: a report costs far below a ms."""

    def open(
        self,
        model: str,
        replica: str,
        registry: Any,
        deploy: str = "",
        on_order: Callable[[Order], object] | None = None,
    ) -> Order | None:
        """Begin to report. Answers with the order that stands for the model; later ones come through `on_order`."""
        self.model, self.replica, self.registry, self.deploy = model, replica, registry, deploy
        self.on_order = on_order
        self.states: dict[str, Replica] = {}
        self._lock = threading.Lock()
        self.board = board()
        standing = ray.get(self.board.standing.remote(model, deploy), timeout=ANSWER_S) if on_order else None
        threading.Thread(target=self._beat, name="report", daemon=True).start()
        return standing

    def event(self, event: LoadEvent, copy: int = 0) -> None:
        """Loading has come so far; `copy` numbers the loads after the first."""
        name = f"{self.replica}/{copy}" if copy else self.replica
        process = self.replica if copy else ""
        with self._lock:
            for earlier in [other for other in self.states if copy and "/" in other and other != name]:
                self._forget(earlier)
            state = self.states.get(name) or Replica(self.model, name, event, None, -1, process, self.deploy)
            self.states[name] = replace(state, event=event, step=state.step + 1)
            self.board.report.remote(self.states[name])

    def facts(self, facts: dict[str, Any], order: Order | None = None) -> None:
        """What became of the model that serves now, and the order that it was loaded by."""
        with self._lock:
            state = self.states[self.replica]
            self.states[self.replica] = replace(state, facts=facts, order=order, step=state.step + 1)
            self.board.report.remote(self.states[self.replica])

    def replaced(self, copy: int) -> None:
        """The copy of this number serves now."""
        with self._lock:
            self._forget(f"{self.replica}/{copy}")

    def refused(self, order: Order, reason: str) -> None:
        """The order could not be carried out."""
        self.board.refused.remote(self.model, order.number, reason)

    def _forget(self, name: str) -> None:
        del self.states[name]
        self.board.forget.remote(self.model, name)

    def _beat(self) -> None:
        while True:
            try:
                with self._lock:
                    reports = [self.board.report.remote(state) for state in self.states.values()]
                self.board.measure.remote(self.model, self.replica, list(self.registry.collect()))
                for order in ray.get(reports, timeout=ANSWER_S):
                    if order is not None and self.on_order is not None:
                        self.on_order(order)
            except Exception as error:  # a replica serves on without its board; the next beat tries again
                logger.warning("the board can't be told: %r", error)
                self.board = board()
            time.sleep(BEAT_S)
