"""One small actor that knows how every replica is; replicas report to it, ingresses listen to it.

A process's report carries all that it has to say of its model and is repeated every second, so no order of arrival
can leave the board wrong, one that starts anew is complete within a second, and a process that falls silent is known to
be gone.
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
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from deployments.gpu_share import GpuUse
from deployments.progress import LoadEvent
from deployments.spec import Order
from serve.guard import SAMPLE_S, Guard
from serve.reloads import Reload, Reloads
from serve.settings import GuardSettings

logger = logging.getLogger("ray.serve")

NAME, NAMESPACE = "dure-board", "dure"
BEAT_S = 1.0
SILENCE_S = 10.0
"""A replica not heard of for this long is gone: ten beats, as loading may hold the interpreter for seconds."""
DIED = "the process died while loading"
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
    process: str = ""
    """The replica that loads a second copy, where this is one; else empty."""
    overload: str = ""
    """Why its machine should be given no more work."""
    gpu: GpuUse | None = None


@dataclass(frozen=True)
class Report:
    """All that a process has to say of the model that it serves."""

    model: str
    process: str
    deploy: str = ""
    step: int = 0
    """Counts the reports that say something new: Ray may deliver two of them in the wrong order."""
    states: dict[str, Replica] = field(default_factory=dict)
    """By name: the replica itself, and the copy that it loads."""
    order: Order | None = None
    """The last order to reload that it has carried out."""
    begun: int = 0
    """Number of the last order that it has begun to carry out."""
    refused: tuple[Order, str] | None = None
    """The last order that it could not carry out, and why; it serves on as before."""

    @property
    def serves(self) -> bool:
        return self.process in self.states and self.states[self.process].event.status == "ready"


@dataclass(frozen=True)
class Changes:
    """What a listener has missed: states in order, None where a replica is gone. `whole`: all there is."""

    epoch: str
    sequence: int
    whole: bool
    states: list[tuple[Key, Replica | None]]
    stops: int = 0
    """How often the application has been about to stop."""


class Board:
    def __init__(self) -> None:
        self.epoch = uuid.uuid4().hex
        self.sequence = 0
        self.stops = 0
        self.replicas: dict[Key, Replica] = {}
        self.reports: dict[Key, Report] = {}
        self.heard: dict[Key, float] = {}
        self.history: deque[tuple[Key, Replica | None]] = deque(maxlen=HISTORY)
        self.changed = asyncio.Event()
        self.measured: dict[Key, tuple[float, Any]] = {}
        self.reloads: defaultdict[str, Reloads] = defaultdict(Reloads)
        self.sweeping: asyncio.Task[None] | None = None

    async def report(self, report: Report) -> Order | None:
        """Take note of how a process is; answers with what it is to reload, if it is its turn."""
        key = (report.model, report.process)
        self.heard[key] = time.monotonic()
        known = self.reports.get(key)
        if known is None or report.step > known.step:
            self._take(report, known.states if known else {})
        if self.sweeping is None:
            self.sweeping = asyncio.create_task(self._sweep())
        if not report.serves:
            return None
        return self.reloads[report.model].ready(report.process, self.reports[key].order, self._serving(report.model))

    async def standing(self, model: str, deploy: str) -> Order | None:
        """What a replica that starts now has to load instead of what its config says."""
        return self.reloads[model].started(deploy)

    async def order(self, model: str, changes: dict[str, Any]) -> Order:
        """Have all replicas of a model reload, one after the other. Raises ValueError while they do already."""
        reports = [report for report in self.reports.values() if report.model == model]
        deploy = reports[-1].deploy if reports else ""
        return self.reloads[model].order(deploy, changes, max((report.begun for report in reports), default=0))

    async def reload(self, model: str) -> tuple[Reload | None, int]:
        """How the model's last order is getting on, and the number of the last change until now."""
        return self.reloads[model].latest, self.sequence

    async def stop(self) -> None:
        """The application is about to stop: tell all who listen."""
        self.stops += 1
        self._wake()

    async def measure(self, model: str, replica: str, families: Any) -> None:
        """Take a process's metrics: prometheus_client's families as it collected them."""
        self.measured[model, replica] = (time.monotonic(), families)

    async def metrics(self) -> dict[Key, Any]:
        now = time.monotonic()
        self.measured = {key: value for key, value in self.measured.items() if now - value[0] < SILENCE_S}
        return {key: families for key, (_, families) in self.measured.items()}

    async def listen(self, epoch: str, since: int, stops: int = 0) -> Changes:
        """What has changed since a sequence number of this epoch; waits a few seconds for something to change.

        `stops` is what the listener knows of them.
        """
        if epoch != self.epoch or self.sequence - since > len(self.history):
            return Changes(self.epoch, self.sequence, True, list(self.replicas.items()), self.stops)
        if since == self.sequence and stops == self.stops:
            changed = self.changed
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), LISTEN_S)
        missed = self.sequence - since
        states = list(self.history)[len(self.history) - missed :]
        return Changes(self.epoch, self.sequence, False, states, self.stops)

    def _serving(self, model: str) -> set[str]:
        """The model's replicas that are ready."""
        return {report.process for report in self.reports.values() if report.model == model and report.serves}

    def _take(self, report: Report, before: dict[str, Replica]) -> None:
        self.reports[report.model, report.process] = report
        for name in before.keys() - report.states.keys():
            last = before[name]
            if last.event.status not in ("ready", "failed"):  # the report that it was ready has been overtaken
                self._note((report.model, name), replace(last, event=last.event.as_ready()))
            self._note((report.model, name), None)
        for name, state in report.states.items():
            if before.get(name) != state:
                if state.event.status == "ready" and (name not in before or before[name].event != state.event):
                    self._forget_failures(report.model)
                self._note((report.model, name), state)
        if report.refused:
            self.reloads[report.model].refused(*report.refused)

    def _note(self, key: Key, state: Replica | None) -> None:
        if state is None:
            self.replicas.pop(key, None)
        else:
            self.replicas[key] = state
        self.sequence += 1
        self.history.append((key, state))
        self._wake()

    def _wake(self) -> None:
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
                if time.monotonic() - heard > SILENCE_S:
                    del self.heard[key]
                    self._bury(self.reports.pop(key))

    def _bury(self, report: Report) -> None:
        for name, state in report.states.items():
            if state.event.status == "ready":
                self._note((report.model, name), None)
            elif state.event.status != "failed":
                event = LoadEvent("failed", state.event.progress, f"Failed: {DIED}", f"실패: {DIED}")
                self._note((report.model, name), replace(state, event=event))


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

    def __init__(self, limits: GuardSettings | None = None) -> None:
        self.guard = Guard(limits or GuardSettings())
        """Of this process's machine; looked at while there are reports."""

    def open(
        self,
        model: str,
        replica: str,
        registry: Any,
        deploy: str = "",
        on_order: Callable[[Order], object] | None = None,
    ) -> Order | None:
        """Begin to report. Answers with the order that stands for the model; later ones come through `on_order`."""
        self.said = Report(model, replica, deploy)
        self.registry, self.on_order = registry, on_order
        self._lock = threading.Lock()
        self.board = board()
        standing = ray.get(self.board.standing.remote(model, deploy), timeout=ANSWER_S) if on_order else None
        threading.Thread(target=self._beat, name="report", daemon=True).start()
        return standing

    def event(self, event: LoadEvent, copy: int = 0) -> None:
        """Loading has come so far; `copy` numbers the loads after the first, of which the last is told of."""
        with self._lock:
            said = self.said
            if copy:
                name, kept, process = f"{said.process}/{copy}", self._itself(), said.process
            else:
                name, kept, process = said.process, said.states, ""
            state = said.states.get(name) or Replica(said.model, name, event, None, process)
            self._say(states=kept | {name: replace(state, event=event)}, begun=max(said.begun, copy))

    def facts(self, facts: dict[str, Any], order: Order | None = None) -> None:
        """What became of the model that serves now, and the order that it was loaded by; there is no copy any more."""
        with self._lock:
            [(name, state)] = self._itself().items()
            self._say(states={name: replace(state, facts=facts)}, order=order)

    def gpu(self, use: GpuUse) -> None:
        """What this process takes of its GPU now."""
        with self._lock:
            [(name, state)] = self._itself().items()
            self._say(states=self.said.states | {name: replace(state, gpu=use)})

    def refused(self, order: Order, reason: str) -> None:
        """The order could not be carried out."""
        with self._lock:
            self._say(refused=(order, reason))

    def _itself(self) -> dict[str, Replica]:
        return {self.said.process: self.said.states[self.said.process]}

    def _say(self, **news: Any) -> None:
        self.said = replace(self.said, step=self.said.step + 1, **news)
        self.board.report.remote(self.said)

    def _look(self) -> None:
        """How the machine is, where that is news."""
        self.guard.sample()
        reason = self.guard.reason
        with self._lock:
            told = {name: replace(state, overload=reason) for name, state in self.said.states.items()}
            if told != self.said.states:
                self._say(states=told)

    def _beat(self) -> None:
        looked_at = 0.0
        while True:
            try:
                if time.monotonic() - looked_at >= SAMPLE_S:
                    looked_at = time.monotonic()
                    self._look()
                with self._lock:
                    answer = self.board.report.remote(self.said)
                self.board.measure.remote(self.said.model, self.said.process, list(self.registry.collect()))
                order = ray.get(answer, timeout=ANSWER_S)
                if order is not None and self.on_order is not None:
                    self.on_order(order)
            except Exception as error:  # a replica serves on without its board; the next beat tries again
                logger.warning("the board can't be told: %r", error)
                with contextlib.suppress(Exception):
                    self.board = board()
            time.sleep(BEAT_S)
