"""A process's connection to admission, and what the process has in lanes."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray.exceptions import RayActorError, RayError

from serve import errors
from serve.caller import Caller
from serve.metrics import REJECTED
from serve.progress import Following
from serve.queues.admission import BEAT_S, LaneReply, LaneReport, TurnedAway, admission
from serve.queues.gate import Gate
from serve.queues.lane import Asked, Decision, Standing
from serve.queues.tickets import LONGEST_S, Refused
from serve.waiting import within

logger = logging.getLogger("ray.serve")

ANSWER_S = 5.0
FOLLOWED_BEAT_S = 0.25
"""While a client follows its place in a lane."""
RETRY_PAUSE_S = 0.2
AWAY_S = 20.0
"""How long a request waits for admission, which takes seconds to restart on a busy machine."""


@dataclass
class Full:
    """A lane that is full for a tenant, with no tickets left for its newcomers."""

    refused: Refused
    """The refusal that admission gave one of them."""
    until: float
    """How long that refusal stands for others (time.monotonic)."""
    seconds: float = 0.0
    """Time it takes to serve those that have been refused with it since."""

    def one_more(self) -> Refused:
        """The refusal of the next one, to come back after the others."""
        self.seconds += self.refused.each_s
        return replace(self.refused, retry_after_s=min(self.refused.retry_after_s + int(self.seconds), LONGEST_S))


class Lanes:
    """Gets requests into lanes, and reports every second what this process has, so that nothing is held twice or lost.

    A flood does not reach admission: a refusal that it has just given to one newcomer is repeated here to the next.
    """

    def __init__(self, holder: str, limits: dict[str, tuple[int, int]], weights: dict[str, float]) -> None:
        """`limits` by lane: how many run and how many wait. A tenant's weight is 1 if `weights` has none."""
        self.holder = holder
        self.limits = limits
        self.weights = weights
        self.running: dict[str, Asked] = {}
        self.waiting: dict[str, Following | None] = {}
        self.gates: list[Gate] = []
        self._full: dict[tuple[str, str], Full] = {}
        self._turned_away: dict[tuple[str, str], TurnedAway] = {}
        """Not yet reported to admission; lost if a report is lost. Both by lane and tenant."""
        self._actor: Any = None
        self._wake = asyncio.Event()
        self._beating: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether this process still reports to admission."""
        return self._beating is not None and not self._beating.done()

    def start(self, gates: list[Gate]) -> None:
        """Begin to report, also what waits at `gates` for models; needs a running event loop."""
        self.gates = gates
        self._beating = asyncio.get_running_loop().create_task(self._beat())

    @asynccontextmanager
    async def admitted(self, lane: str, caller: Caller, following: Following | None = None) -> AsyncIterator[None]:
        """Hold a slot of the lane while the body runs. Raises DureError if none is granted in time."""
        if self.full(lane, caller):
            raise self.turn_away(lane, caller).error(lane)
        max_concurrent, max_queue = self.limits[lane]
        asked = Asked(
            uuid.uuid4().hex,
            lane,
            caller.tenant,
            self.holder,
            caller.left_s(),
            max_concurrent,
            max_queue,
            self.weights.get(caller.tenant, 1.0),
            caller.ticket,
        )
        self.waiting[asked.id] = following
        if following:
            self._wake.set()
        decision: Decision | None = None
        try:
            decision = await self._decision(asked, caller)
            if isinstance(decision, Refused):
                REJECTED.labels(lane).inc()
                if decision.stands_s:
                    self._full[lane, caller.tenant] = Full(decision, time.monotonic() + decision.stands_s)
                raise decision.error(lane)
            if decision != "admitted":
                raise errors.too_late(lane, caller.timeout_s)
            self.running[asked.id] = asked
            self.waiting.pop(asked.id)
            if following:
                following.running()
            yield
        finally:
            self.waiting.pop(asked.id, None)
            self.running.pop(asked.id, None)
            if decision in (None, "admitted") and self._actor is not None:
                self._actor.leave.remote(asked.id)

    async def queues(self) -> dict[str, Any]:
        """State of the cluster's lanes, and what waits for models. Raises DureError."""
        try:
            async with asyncio.timeout(AWAY_S):
                reply = await self._ask_queues()
        except (RayError, TimeoutError) as error:
            raise errors.no_admission() from error
        idle = {name: asdict(Standing.idle(*limits)) for name, limits in self.limits.items()}
        return reply | {"lanes": idle | reply["lanes"]}

    async def _ask_queues(self) -> dict[str, Any]:
        """Retried if the actor has died."""
        while True:
            try:
                reply: dict[str, Any] = await (await self._admission()).queues.remote()
                return reply
            except (RayActorError, ValueError):
                self._actor = None
            await asyncio.sleep(RETRY_PAUSE_S)

    def full(self, lane: str, caller: Caller) -> Full | None:
        """Admission's last refusal of a newcomer of the tenant's, while it stands; None for callers with a ticket."""
        full = self._full.get((lane, caller.tenant))
        return None if caller.ticket or full is None or time.monotonic() >= full.until else full

    def turn_away(self, lane: str, caller: Caller) -> Refused:
        """Refuse one more newcomer of a tenant for which the lane is `full`, to come back after those before it."""
        REJECTED.labels(lane).inc()
        tenant, full = caller.tenant, self._full[lane, caller.tenant]
        before = self._turned_away.get((lane, tenant), TurnedAway(lane, tenant, 0, 0.0))
        away = TurnedAway(lane, tenant, before.count + 1, before.seconds + full.refused.each_s)
        self._turned_away[lane, tenant] = away
        return full.one_more()

    async def _decision(self, asked: Asked, caller: Caller) -> Decision:
        """Retried if the actor has died. Nothing is lost with it, as holders report what they have."""
        away_since: float | None = None
        while True:
            entered: float | None = None
            try:
                async with asyncio.timeout(caller.left_s()):
                    actor = await self._admission()
                    entered = time.monotonic()
                    decision: Decision = await actor.enter.remote(replace(asked, timeout_s=caller.left_s()))
                if decision != "gone":
                    return decision
                away_since = None  # admission had heard nothing of this process for a while
            except TimeoutError as error:
                raise errors.too_late(asked.lane, caller.timeout_s) from error
            except (RayActorError, ValueError) as error:
                self._actor = None
                now = time.monotonic()
                was_there = entered is not None and now - entered > RETRY_PAUSE_S
                away_since = now if away_since is None or was_there else away_since
                if now - away_since > AWAY_S:
                    raise errors.no_admission() from error
            await asyncio.sleep(min(RETRY_PAUSE_S, caller.left_s()))

    async def _admission(self) -> Any:
        if self._actor is None:
            self._actor = await asyncio.to_thread(admission)
        return self._actor

    async def _beat(self) -> None:
        while True:
            try:
                actor = await self._admission()
                models = [gate.standing() for gate in self.gates]
                away, self._turned_away = list(self._turned_away.values()), {}
                self._full = {key: full for key, full in self._full.items() if time.monotonic() < full.until}
                report = LaneReport(self.holder, list(self.running.values()), list(self.waiting), models, away)
                reply: LaneReply = await asyncio.wait_for(actor.report.remote(report), ANSWER_S)
                for gate in self.gates:
                    gate.tickets.key = reply.key
                for id, (place, wait_s) in reply.places.items():
                    if following := self.waiting.get(id):
                        following.queued(place, wait_s)
            except Exception as error:  # it restarts by itself; admitted requests keep running
                logger.warning("could not report to admission: %r", error)
                self._actor = None
            self._wake.clear()
            await within(self._wake, FOLLOWED_BEAT_S if any(self.waiting.values()) else BEAT_S)
