"""A process's line to the board: reports its state every second, and changes at once."""

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
    """A process's line to the board. Only `open` waits for an answer; a report costs far less than 1 ms."""

    def __init__(self, limits: GuardSettings | None = None) -> None:
        self.guard = Guard(limits or GuardSettings())
        """Of this process's machine; sampled once reporting has begun."""

    def open(
        self,
        model: str,
        replica: str,
        registry: Any,
        deploy: str = "",
        on_order: Callable[[Order], object] | None = None,
    ) -> Order | None:
        """Begin to report. Returns the order that stands for the model; later ones come through `on_order`."""
        self.last = Report(model, replica, deploy)
        self.registry, self.on_order = registry, on_order
        self._lock = threading.Lock()
        self.board = board()
        standing = ray.get(self.board.standing.remote(model, deploy), timeout=ANSWER_S) if on_order else None
        threading.Thread(target=self._beat, name="report", daemon=True).start()
        return standing

    def event(self, event: LoadEvent, copy: int = 0) -> None:
        """Report how far loading is. `copy` numbers the loads after the first; only the last of them is reported."""
        with self._lock:
            last = self.last
            if copy:
                name, kept, process = f"{last.process}/{copy}", self._own_state(), last.process
            else:
                name, kept, process = last.process, last.states, ""
            state = last.states.get(name) or Replica(last.model, name, event, None, process)
            self._publish(states=kept | {name: replace(state, event=event)}, begun=max(last.begun, copy))

    def facts(self, facts: dict[str, Any], order: Order | None = None) -> None:
        """Report the facts of the model that serves now, and the order that loaded it. No copy is left."""
        with self._lock:
            [(name, state)] = self._own_state().items()
            self._publish(states={name: replace(state, facts=facts)}, order=order)

    def gpu(self, use: GpuUse) -> None:
        """Report this process's current use of its GPU."""
        with self._lock:
            [(name, state)] = self._own_state().items()
            self._publish(states=self.last.states | {name: replace(state, gpu=use)})

    def refused(self, order: Order, reason: str) -> None:
        """Report that an order could not be carried out."""
        with self._lock:
            self._publish(refused=(order, reason))

    def _own_state(self) -> dict[str, Replica]:
        return {self.last.process: self.last.states[self.last.process]}

    def _publish(self, **changes: Any) -> None:
        self.last = replace(self.last, step=self.last.step + 1, **changes)
        self.board.report.remote(self.last)

    def _sample(self) -> None:
        """Sample the machine, and report if its overload has changed."""
        self.guard.sample()
        reason = self.guard.reason
        with self._lock:
            states = {name: replace(state, overload=reason) for name, state in self.last.states.items()}
            if states != self.last.states:
                self._publish(states=states)

    def _beat(self) -> None:
        sampled_at = 0.0
        while True:
            try:
                if time.monotonic() - sampled_at >= SAMPLE_S:
                    sampled_at = time.monotonic()
                    self._sample()
                with self._lock:
                    answer = self.board.report.remote(self.last)
                self.board.measure.remote(self.last.model, self.last.process, list(self.registry.collect()))
                order = ray.get(answer, timeout=ANSWER_S)
                if order is not None and self.on_order is not None:
                    self.on_order(order)
            except Exception as error:  # a replica keeps serving without its board; the next beat tries again
                logger.warning("could not report to the board: %r", error)
                with contextlib.suppress(Exception):
                    self.board = board()
            time.sleep(BEAT_S)
