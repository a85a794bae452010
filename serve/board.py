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
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import ray

from deployments.progress import LoadEvent

logger = logging.getLogger("ray.serve")

NAME, NAMESPACE = "dure-board", "dure"
BEAT_S = 1.0
SILENCE_S = 10.0
"""A replica not heard of for this long is gone: ten beats, as loading may hold the interpreter for seconds."""
LISTEN_S = 5.0
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
        self.sweeping: asyncio.Task[None] | None = None

    async def report(self, replica: Replica) -> None:
        key = (replica.model, replica.replica)
        self.heard[key] = time.monotonic()
        known = self.replicas.get(key)
        if known is None or replica.step > known.step:
            if replica.event.status == "ready":
                self._forget_failures(replica.model)
            self._note(key, replica)
        if self.sweeping is None:
            self.sweeping = asyncio.create_task(self._sweep())

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
    """A process's line to the board. Nothing here waits for an answer: a report costs well under a millisecond."""

    def open(self, model: str, replica: str, registry: Any) -> None:
        self.model, self.replica, self.registry = model, replica, registry
        self.state: Replica | None = None
        self._lock = threading.Lock()
        self.board = board()
        threading.Thread(target=self._beat, name="report", daemon=True).start()

    def event(self, event: LoadEvent) -> None:
        with self._lock:
            facts, step = (self.state.facts, self.state.step + 1) if self.state else (None, 0)
            self.state = Replica(self.model, self.replica, event, facts, step)
            self.board.report.remote(self.state)

    def facts(self, facts: dict[str, Any]) -> None:
        with self._lock:
            if self.state is not None:
                self.state = replace(self.state, facts=facts, step=self.state.step + 1)

    def _beat(self) -> None:
        while True:
            try:
                with self._lock:
                    if self.state is not None:
                        self.board.report.remote(self.state)
                self.board.measure.remote(self.model, self.replica, list(self.registry.collect()))
            except Exception as error:  # a replica serves on without its board; the next beat tries again
                logger.warning("the board can't be told: %r", error)
                self.board = board()
            time.sleep(BEAT_S)
