"""Running a batch so that neither a bad item nor a lack of memory harms the others in it."""

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
from deployments.memory import Memory
from deployments.messages import Refusal
from deployments.metrics import OUT_OF_MEMORY
from deployments.process import use_threads
from deployments.spec import ItemError

logger = logging.getLogger("ray.serve")

FAILURES_BEFORE_TEST = 3
"""So many items failing in a row put the engine to the test: it has to run its own warm-up."""
MAX_STALL_S = 600.0
"""An engine that has not come back from one batch for this long is dead."""
FAILED = "the model failed on this item; the reason is in the replica's log"
TOO_LARGE = "this item alone needs more memory than there is; make it smaller"
NO_ROOM = "there is no memory for so many at once; send it again"


class EngineDead(Exception):
    """The engine fails whatever it is given, so the replica has to be replaced."""


@dataclass
class Outcome:
    """What became of a batch."""

    pieces: list[tuple[Sequence[int], Any]] = field(default_factory=list)
    """Rows of the batch that ran together, and their results."""
    refusals: dict[int, Refusal] = field(default_factory=dict)
    """By row."""
    unfinished: list[int] = field(default_factory=list)
    """Rows that have further steps to take."""
    did_not_fit: list[range] = field(default_factory=list)
    """Rows that ran out of memory together."""
    put_off: list[int] = field(default_factory=list)
    """Rows that did not fit beside the others that are on their way."""


class Runner:
    """Runs batches on an engine. A batch that fails is run again in halves, down to the item at fault."""

    def __init__(self, engine: Engine[Any, Any, Any], memory: Memory, threads: ThreadChoice | None = None) -> None:
        """`threads`: how many torch uses for a batch; left as they are where there is no choice."""
        self.engine = engine
        self.memory = memory
        self.threads = threads
        self.failures = 0
        self.dead = ""
        self.busy_since: dict[int, float] = {}
        """When each batch that runs has begun, by its thread."""

    def run(self, items: list[Any], tokens: int = 1) -> Outcome:
        """Every row is in a piece, refused or unfinished. `tokens`, padding included, say how large the batch is."""
        outcome = Outcome()
        thread, started = threading.get_ident(), time.monotonic()
        self.busy_since[thread] = started
        count = self.threads.choose(tokens) if self.threads else 0
        if count:
            use_threads(count)
        try:
            self._run(items, range(len(items)), outcome)
        finally:
            del self.busy_since[thread]
        if self.threads:
            self.threads.observe(tokens, count, time.monotonic() - started)
        return outcome

    def padded(self, tokens: list[int]) -> int:
        """Tokens that a batch of items of so many tokens computes."""
        return max(1, *tokens) * len(tokens)

    def check(self) -> None:
        """Raises EngineDead where the engine hangs, or fails even what it warmed up with."""
        if time.monotonic() - min(list(self.busy_since.values()), default=math.inf) > MAX_STALL_S:
            raise EngineDead(f"the engine has not come back from a batch for {MAX_STALL_S:.0f} s")
        if self.dead:
            raise EngineDead(f"the engine fails whatever it is given: {self.dead}")

    def _run(self, items: list[Any], rows: range, outcome: Outcome) -> None:
        try:
            self.memory.begin()
            self._attempt(items, rows, outcome)
            self.failures = 0
            return
        except Exception as error:  # an engine may trip over anything; its neighbours must not
            logger.warning("a batch of %d failed: %s", len(rows), repr(error))  # a record keeps what it is given
            no_memory = _out_of_memory(error)
            if no_memory:
                OUT_OF_MEMORY.inc()
                outcome.did_not_fit.append(rows)
            if len(rows) == 1:
                self._give_up(rows[0], error, no_memory, outcome)
                return
        # Outside the handler, whose traceback holds the failed batch's tensors alive.
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
            return Refusal(str(error), "invalid", error.field)
        self.failures += 1
        if self.failures >= FAILURES_BEFORE_TEST:
            self._test()
        return Refusal(TOO_LARGE, "too_large") if no_memory else Refusal(FAILED, "failed")

    def _test(self) -> None:
        """Tell a dead engine from one that was given bad items."""
        try:
            self.engine.warm_up()
            self.failures = 0
        except Exception as error:
            self.dead = repr(error)


class StepRunner(Runner):
    """Takes all items that are on their way one step further, with those that have just begun."""

    def __init__(self, engine: Stepping[Any, Any, Any], memory: Memory, threads: ThreadChoice | None = None) -> None:
        super().__init__(engine, memory, threads)
        self.steps = engine

    def run(self, items: list[Any], tokens: int = 1) -> Outcome:
        """Where memory is short, some are put off to the next step, until others have left theirs.

        Where none can go on, the one that came last is refused.
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
        return max(1, sum(tokens))

    def _attempt(self, items: list[Any], rows: range, outcome: Outcome) -> None:
        self.steps.step([items[row] for row in rows])
        done = [row for row in rows if items[row].result is not None]
        outcome.pieces.append((done, [items[row].result for row in done]))
        outcome.unfinished += [row for row in rows if items[row].result is None]


def _out_of_memory(error: Exception) -> bool:
    """torch's OutOfMemoryError on a GPU; on a CPU its allocator raises a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
