"""Runs a batch so that neither a bad item nor a lack of memory harms the other items in it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.batching.threads import ThreadChoice
from deployments.collector import count as count_of
from deployments.engines.contract import Engine, Stepping
from deployments.memory import Memory, is_out_of_memory
from deployments.messages import Refusal
from deployments.metrics import OUT_OF_MEMORY
from deployments.process import use_threads
from deployments.spec import ItemError

logger = logging.getLogger("ray.serve")

FAILURES_BEFORE_TEST = 3
"""After this many failed items in a row, the engine must prove that it still works, by running its warm-up."""
MAX_STALL_S = 600.0
"""An engine that spends longer than this on one batch is considered dead."""
FAILED = "the model failed on this item; the reason is in the replica's log"
TOO_LARGE = "this item alone needs more memory than is available; make it smaller"
NO_ROOM = "there is not enough memory for this many items at once; send it again"


class EngineDead(Exception):
    """The engine hangs or fails on every input, so the replica must be replaced."""


@dataclass
class Outcome:
    """The result of running a batch. Items are identified by their row in the batch."""

    pieces: list[tuple[Sequence[int], Any]] = field(default_factory=list)
    """Rows that ran together, with their results."""
    refusals: dict[int, Refusal] = field(default_factory=dict)
    """Refused items by row."""
    unfinished: list[int] = field(default_factory=list)
    """Rows that need further steps."""
    did_not_fit: list[range] = field(default_factory=list)
    """Rows that ran out of memory together."""
    put_off: list[int] = field(default_factory=list)
    """Rows postponed to a later step because they did not fit beside the others."""


class Runner:
    """Runs batches on an engine. A failed batch is run again in halves until the item at fault is found."""

    def __init__(self, engine: Engine[Any, Any, Any], memory: Memory, threads: ThreadChoice | None = None) -> None:
        """`threads` chooses torch's thread count per batch. None leaves it unchanged."""
        self.engine = engine
        self.memory = memory
        self.threads = threads
        self.failures = 0
        """Items that have failed in a row."""
        self.dead = ""
        """Why the engine is dead; empty while it works."""
        self.busy_since: dict[int, float] = {}
        """Start time of each running batch, by thread id, on the clock of time.monotonic."""

    def run(self, items: list[Any], tokens: int = 1) -> Outcome:
        """Run a batch of `tokens` padded tokens. Every row ends up in a piece, refused or unfinished."""
        outcome = Outcome()
        thread, started = threading.get_ident(), time.monotonic()
        self.busy_since[thread] = started
        thread_count = self.threads.choose(tokens) if self.threads else 0
        if thread_count:
            use_threads(thread_count)
        try:
            self._run(items, range(len(items)), outcome)
        finally:
            del self.busy_since[thread]
        if self.threads:
            self.threads.observe(tokens, thread_count, time.monotonic() - started)
        return outcome

    def padded(self, tokens: list[int]) -> int:
        """Tokens computed for a batch of items with these token counts, padding included."""
        return max(1, *tokens) * len(tokens)

    def check(self) -> None:
        """Raises EngineDead if the engine hangs or fails its own warm-up."""
        if time.monotonic() - min(list(self.busy_since.values()), default=math.inf) > MAX_STALL_S:
            raise EngineDead(f"the engine has not returned from a batch for {MAX_STALL_S:.0f} s")
        if self.dead:
            raise EngineDead(f"the engine fails on every input: {self.dead}")

    def _run(self, items: list[Any], rows: range, outcome: Outcome) -> None:
        try:
            self.memory.begin()
            self._attempt(items, rows, outcome)
            self.failures = 0
            return
        except Exception as error:  # an engine may raise anything; other items must not suffer
            # repr, because a log record would keep the error and the tensors of its traceback alive.
            logger.warning("a batch of %d failed: %s", len(rows), repr(error))
            no_memory = is_out_of_memory(error)
            if no_memory:
                OUT_OF_MEMORY.inc()
                outcome.did_not_fit.append(rows)
            if len(rows) == 1:
                self._give_up(rows[0], error, no_memory, outcome)
                return
        # Not in the except block, where the error's traceback still holds the failed batch's tensors.
        if no_memory:
            self.memory.release()
        half = len(rows) // 2
        self._run(items, rows[:half], outcome)
        self._run(items, rows[half:], outcome)

    def _attempt(self, items: list[Any], rows: range, outcome: Outcome) -> None:
        results = self.engine.run([items[row] for row in rows])
        if count_of(results) != len(rows):
            raise RuntimeError(f"the engine answered {len(rows)} items with {count_of(results)} results")
        outcome.pieces.append((rows, results))

    def _give_up(self, row: int, error: Exception, no_memory: bool, outcome: Outcome) -> None:
        outcome.refusals[row] = self._refuse(error, no_memory)

    def _refuse(self, error: Exception, no_memory: bool) -> Refusal:
        if isinstance(error, ItemError):
            return Refusal(str(error), "invalid", error.field, error.code)
        self.failures += 1
        if self.failures >= FAILURES_BEFORE_TEST:
            self._test()
        return Refusal(TOO_LARGE, "too_large") if no_memory else Refusal(FAILED, "failed")

    def _test(self) -> None:
        """Tell a dead engine from bad items: a working one runs its warm-up."""
        try:
            self.engine.warm_up()
            self.failures = 0
        except Exception as error:
            self.dead = repr(error)


class StepRunner(Runner):
    """Advances all running items, including those that have just joined, by one step."""

    def __init__(self, engine: Stepping[Any, Any, Any], memory: Memory, threads: ThreadChoice | None = None) -> None:
        super().__init__(engine, memory, threads)
        self.steps = engine

    def run(self, items: list[Any], tokens: int = 1) -> Outcome:
        """Run one step. If memory is short, some items are postponed until others have finished.

        If none can go on, the most recent item is refused.
        """
        outcome = super().run(items, tokens)
        if outcome.put_off and len(outcome.put_off) == len(items):
            last = max(outcome.put_off)
            outcome.put_off.remove(last)
            outcome.refusals[last] = Refusal(TOO_LARGE if len(items) == 1 else NO_ROOM, "too_large")
        outcome.unfinished = sorted([*outcome.unfinished, *outcome.put_off])
        return outcome

    def _give_up(self, row: int, error: Exception, no_memory: bool, outcome: Outcome) -> None:
        if no_memory:
            outcome.put_off.append(row)
        else:
            super()._give_up(row, error, no_memory, outcome)

    def padded(self, tokens: list[int]) -> int:
        """Tokens of these items: a step needs no padding."""
        return max(1, sum(tokens))

    def _attempt(self, items: list[Any], rows: range, outcome: Outcome) -> None:
        self.steps.step([items[row] for row in rows])
        done = [row for row in rows if items[row].result is not None]
        outcome.pieces.append((done, [items[row].result for row in done]))
        outcome.unfinished += [row for row in rows if items[row].result is None]
