"""A small actor that knows the state of every replica. Replicas report to it; ingresses listen to it.

A report carries the full state of a process's model and is repeated every second. So no order of arrival can leave the
board wrong, a new board is complete within a second, and a process that falls silent is known to be gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import defaultdict, deque
from dataclasses import replace
from typing import Any

from deployments.load_progress import LoadEvent
from deployments.spec import Order
from serve.actors import only
from serve.board.reloads import Reload, Reloads
from serve.board.reports import BEAT_S, DIED, HISTORY, LISTEN_S, SILENCE_S, Changes, Key, Replica, Report
from serve.roster import Roster
from serve.waiting import within

logger = logging.getLogger("ray.serve")

NAME = "dure-board"
LEARN_S = 2.5 * BEAT_S
"""By this time all processes have reported to a board that replaces one that died."""


class Board:
    def __init__(self) -> None:
        self.epoch, self.started = uuid.uuid4().hex, time.monotonic()
        self.sequence = 0
        self.stops = 0
        self.replicas: dict[Key, Replica] = {}
        self.reports: dict[Key, Report] = {}
        self.roster: Roster[Key] = Roster(SILENCE_S)
        self.history: deque[tuple[Key, Replica | None]] = deque(maxlen=HISTORY)
        self.changed = asyncio.Event()
        self.measured: dict[Key, tuple[float, Any]] = {}
        self.reloads: defaultdict[str, Reloads] = defaultdict(Reloads)
        self.sweeping: asyncio.Task[None] | None = None

    async def report(self, report: Report) -> Order | None:
        """Record a process's report. Returns the order to reload, if it is this replica's turn."""
        key = (report.model, report.process)
        self.roster.hear(key)
        known = self.reports.get(key)
        if known is None or report.step > known.step:
            self._take(report, known.states if known else {})
        if self.sweeping is None:
            self.sweeping = asyncio.create_task(self._sweep())
        if not report.serves:
            return None
        return self.reloads[report.model].ready(report.process, self.reports[key].order, self._serving(report.model))

    async def standing(self, model: str, deploy: str) -> Order | None:
        """The order that a replica must follow at its start instead of its config, if there is one."""
        return self.reloads[model].started(deploy)

    async def order(self, model: str, changes: dict[str, Any]) -> Order:
        """Have all replicas of a model reload, one after the other. Raises ValueError while a reload is under way."""
        reports = [report for report in self.reports.values() if report.model == model]
        deploy = reports[-1].deploy if reports else ""
        return self.reloads[model].order(deploy, changes, max((report.begun for report in reports), default=0))

    async def reload(self, model: str) -> tuple[Reload | None, int]:
        """Progress of the model's last order, and the sequence number of the board's latest change."""
        return self.reloads[model].latest, self.sequence

    async def stop(self) -> None:
        """Tell all listeners that the application is about to stop."""
        self.stops += 1
        self._wake()

    async def measure(self, model: str, replica: str, families: Any) -> None:
        """Store a process's metrics: the families that prometheus_client collected there."""
        self.measured[model, replica] = (time.monotonic(), families)

    async def metrics(self) -> dict[Key, Any]:
        now = time.monotonic()
        self.measured = {key: value for key, value in self.measured.items() if now - value[0] < SILENCE_S}
        return {key: families for key, (_, families) in self.measured.items()}

    async def listen(self, epoch: str, since: int, stops: int = 0) -> Changes:
        """What has changed since sequence number `since` of this epoch; waits a few seconds for a change.

        `stops` is the count that the listener knows.
        """
        if epoch and epoch != self.epoch:  # the board before this one died, and not all have reported to this one yet
            await asyncio.sleep(self.started + LEARN_S - time.monotonic())
        if epoch != self.epoch or self.sequence - since > len(self.history):
            return Changes(self.epoch, self.sequence, True, list(self.replicas.items()), self.stops)
        if since == self.sequence and stops == self.stops:
            changed = self.changed
            await within(changed, LISTEN_S)
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
            if last.event.status not in ("ready", "failed"):  # a newer report overtook the one that said ready
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
            for key in self.roster.silent():
                self._bury(self.reports.pop(key))

    def _bury(self, report: Report) -> None:
        for name, state in report.states.items():
            if state.event.status == "ready":
                self._note((report.model, name), None)
            elif state.event.status != "failed":
                event = LoadEvent("failed", state.event.progress, f"Failed: {DIED}", f"실패: {DIED}")
                self._note((report.model, name), replace(state, event=event))


def board() -> Any:
    """The cluster's board, started if there is none."""
    return only(Board, NAME)
