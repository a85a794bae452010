"""A process's copy of the board, kept current. Routes read it, and streams subscribe to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from serve.board.actor import board
from serve.board.reports import CONSTRUCTOR_TRIES, DIED, HISTORY, LISTEN_S, Changes, Key, Replica

logger = logging.getLogger("ray.serve")


TROUBLE = "trouble"
"""Key of a service's facts: what keeps it from working; empty if nothing does."""

State = Literal["loading", "ready", "failed", "asleep"]


class Watch:
    def __init__(self, sleepers: Iterable[str] = ()) -> None:
        """`sleepers` are the models that have no replica while nobody uses them."""
        self.sleepers = frozenset(sleepers)
        self.replicas: dict[Key, Replica] = {}
        self.stopping = asyncio.Event()
        """Set once the application is about to stop."""
        self._stops: int | None = None
        self._subscribers: set[asyncio.Queue[Replica]] = set()
        self._changed = asyncio.Event()
        self._epoch, self._sequence = "", 0
        self._task: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether this process still listens to the board."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Begin to listen; needs a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._listen())

    def of(self, model: str) -> list[Replica]:
        return [replica for key, replica in self.replicas.items() if key[0] == model]

    def state(self, model: str) -> State:
        """`failed` once as many replicas have failed as Serve tries to start."""
        own = [replica.event for replica in self.of(model) if not replica.process]
        if model in self.sleepers:  # a replica that is not needed any more is ended even while it loads
            own = [event for event in own if not event.message.endswith(DIED)]
            if len(own) < CONSTRUCTOR_TRIES and all(event.status == "failed" for event in own):
                return "asleep"
        statuses = [event.status for event in own]
        if "ready" in statuses:
            return "ready"
        if len(statuses) >= CONSTRUCTOR_TRIES and all(status == "failed" for status in statuses):
            return "failed"
        return "loading"

    def ready(self, model: str) -> int:
        """How many replicas take requests."""
        return sum(replica.event.status == "ready" and not replica.process for replica in self.of(model))

    def version(self, model: str) -> str | None:
        """The version of the model that serves now; None while its replicas differ or are unknown."""
        serving = [replica for replica in self.of(model) if replica.event.status == "ready" and not replica.process]
        versions = {(replica.facts or {}).get("version") for replica in serving}
        return versions.pop() if len(versions) == 1 else None

    def overload(self, model: str) -> str:
        """Why no machine that serves the model should be given more work; empty if one may be."""
        serving = [replica for replica in self.of(model) if replica.event.status == "ready" and not replica.process]
        return serving[0].overload if serving and all(replica.overload for replica in serving) else ""

    def in_steps(self, model: str) -> bool:
        """Whether the model's engine works in steps and takes newcomers at each."""
        return any((replica.facts or {}).get("in_steps") for replica in self.of(model))

    def parallel(self, model: str) -> int:
        """How many batches a replica of the model runs at once."""
        return max((int((replica.facts or {}).get("parallel") or 1) for replica in self.of(model)), default=1)

    def max_tokens(self, model: str) -> int | None:
        """Most tokens of a text that the model reads; None if unknown."""
        limits = [(replica.facts or {}).get("max_tokens") for replica in self.of(model)]
        return max((int(limit) for limit in limits if limit), default=None)

    def reason(self, model: str) -> str:
        """Why a model failed."""
        failures = [r.event.message for r in self.of(model) if r.event.status == "failed"]
        return failures[-1].removeprefix("Failed: ") if failures else ""

    def trouble(self, service: str) -> str:
        """What keeps one of a service's replicas from working; empty if nothing does."""
        troubles = ((replica.facts or {}).get(TROUBLE, "") for replica in self.of(service))
        return next(filter(None, troubles), "")

    def progress(self, model: str) -> float:
        """Load progress of the replica that is furthest, 0 to 100."""
        return max((replica.event.progress for replica in self.of(model)), default=0.0)

    async def settled(self, model: str, timeout_s: float) -> State:
        """The model's state once it is ready or failed, or after `timeout_s`."""
        await self._until(lambda: self.state(model) in ("ready", "failed"), timeout_s)
        return self.state(model)

    async def changed(self) -> None:
        """Returns at the next change of any replica."""
        await self._changed.wait()

    async def reached(self, sequence: int, timeout_s: float) -> None:
        """Returns once the board's change of this number is known here, or after `timeout_s`."""
        await self._until(lambda: self._sequence >= sequence, timeout_s)

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await self._changed.wait()

    @contextmanager
    def subscribe(self) -> Iterator[asyncio.Queue[Replica]]:
        """A queue of every change from now on; a subscriber that does not read loses the oldest."""
        queue: asyncio.Queue[Replica] = asyncio.Queue(HISTORY)
        self._subscribers.add(queue)
        try:
            yield queue
        finally:
            self._subscribers.discard(queue)

    async def _listen(self) -> None:
        actor: Any = None
        while True:
            try:
                actor = actor or await asyncio.to_thread(board)
                heard = actor.listen.remote(self._epoch, self._sequence, self._stops or 0)
                self._take(await asyncio.wait_for(heard, LISTEN_S + 5))
            except Exception as error:  # the board restarts by itself; until then the last copy stays in use
                logger.warning("could not listen to the board: %r", error)
                actor = None
                await asyncio.sleep(0.5)

    def _take(self, changes: Changes) -> None:
        if changes.epoch == self._epoch and self._stops is not None and changes.stops > self._stops:
            self.stopping.set()
        self._epoch, self._sequence, self._stops = changes.epoch, changes.sequence, changes.stops
        if changes.whole:
            self.replicas = {}
        for key, replica in changes.states:
            if replica is None:
                self.replicas.pop(key, None)
                continue
            self.replicas[key] = replica
            for queue in self._subscribers:
                if queue.full():
                    queue.get_nowait()
                queue.put_nowait(replica)
        self._changed.set()
        self._changed = asyncio.Event()
