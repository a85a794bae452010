"""A process's line to the board: how it is, every second, and at once what is new."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray

from deployments.gpu_share import GpuUse
from deployments.load_progress import LoadEvent
from deployments.spec import Order
from serve.board.actor import board
from serve.board.guard import SAMPLE_S, Guard
from serve.board.reports import BEAT_S, Replica, Report
from serve.config.settings import GuardSettings

logger = logging.getLogger("ray.serve")

ANSWER_S = 5.0


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
