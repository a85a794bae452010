"""A process's way into the cluster's lanes, and what it has in them."""

from __future__ import annotations

import asyncio
import contextlib
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
from serve.queues.admission import BEAT_S, Held, Holding, TurnedAway, admission
from serve.queues.gate import Gate
from serve.queues.lane import Asked, Decision, Standing
from serve.queues.tickets import LONGEST_S, Refused

logger = logging.getLogger("ray.serve")

ANSWER_S = 5.0
FOLLOWED_BEAT_S = 0.25
"""While somebody wants to know their place."""
RETRY_PAUSE_S = 0.2
AWAY_S = 20.0
"""How long a request waits for an admission that does not answer."""


@dataclass
class Full:
    """A lane that is full for a tenant, with no tickets left for its newcomers."""

    refused: Refused
    """What one that has asked has heard."""
    until: float
    """Others would hear the same, on the clock of time.monotonic."""
    seconds: float = 0.0
    """That those will take who have heard it since."""

    def one_more(self) -> Refused:
        """What the next one hears, behind the others."""
        self.seconds += self.refused.each_s
        return replace(self.refused, retry_after_s=min(self.refused.retry_after_s + int(self.seconds), LONGEST_S))


class Lanes:
    """Lets requests into lanes, and tells admission every second what this process has, so that nothing is held twice
    and nothing is forgotten. A flood does not reach admission: what it has just said to one newcomer, the next hear
    here."""

    def __init__(self, holder: str, limits: dict[str, tuple[int, int]], weights: dict[str, float]) -> None:
        """`limits` of each lane: how many run and how many wait. A tenant's weight is 1 where `weights` has none."""
        self.holder = holder
        self.limits = limits
        self.weights = weights
        self.running: dict[str, Asked] = {}
        self.waiting: dict[str, Following | None] = {}
        self.gates: list[Gate] = []
        self._full: dict[tuple[str, str], Full] = {}
        self._turned_away: dict[tuple[str, str], TurnedAway] = {}
        """As far as admission has not heard of them; what is lost with it is forgotten. Both by lane and tenant."""
        self._actor: Any = None
        self._wake = asyncio.Event()
        self._beating: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Is admission told what this process has?"""
        return self._beating is not None and not self._beating.done()

    def start(self, gates: list[Gate]) -> None:
        """Begin to tell, also of what waits here for models; needs a running event loop."""
        self.gates = gates
        self._beating = asyncio.get_running_loop().create_task(self._beat())

    @asynccontextmanager
    async def admitted(self, lane: str, caller: Caller, following: Following | None = None) -> AsyncIterator[None]:
        """A slot of the lane's, for as long as the body runs. Raises DureError where there is none in time."""
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
        """How the lanes of the cluster are, and what waits for models. Raises DureError."""
        try:
            async with asyncio.timeout(ANSWER_S):
                told = await self._told_queues()
        except (RayError, TimeoutError) as error:
            raise errors.no_admission() from error
        idle = {name: asdict(Standing.idle(*limits)) for name, limits in self.limits.items()}
        return told | {"lanes": idle | told["lanes"]}

    async def _told_queues(self) -> dict[str, Any]:
        """Asked again where the actor has died."""
        while True:
            try:
                told: dict[str, Any] = await (await self._admission()).queues.remote()
                return told
            except (RayActorError, ValueError):
                self._actor = None
            await asyncio.sleep(RETRY_PAUSE_S)

    def full(self, lane: str, caller: Caller) -> Full | None:
        """What admission has just told another newcomer of the tenant's, as long as it holds; None for tickets."""
        full = self._full.get((lane, caller.tenant))
        return None if caller.ticket or full is None or time.monotonic() >= full.until else full

    def turn_away(self, lane: str, caller: Caller) -> Refused:
        """One more newcomer for whom a lane is `full`: what it hears, behind those before it."""
        REJECTED.labels(lane).inc()
        tenant, full = caller.tenant, self._full[lane, caller.tenant]
        before = self._turned_away.get((lane, tenant), TurnedAway(lane, tenant, 0, 0.0))
        away = TurnedAway(lane, tenant, before.count + 1, before.seconds + full.refused.each_s)
        self._turned_away[lane, tenant] = away
        return full.one_more()

    async def _decision(self, asked: Asked, caller: Caller) -> Decision:
        """Asked again where the actor has died, which forgets nothing that holders know."""
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
                away_since = None  # it had not heard of this process for a while
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
                holding = Holding(self.holder, list(self.running.values()), list(self.waiting), models, away)
                held: Held = await asyncio.wait_for(actor.hold.remote(holding), ANSWER_S)
                for gate in self.gates:
                    gate.tickets.key = held.key
                for id, (place, wait_s) in held.places.items():
                    if following := self.waiting.get(id):
                        following.queued(place, wait_s)
            except Exception as error:  # it restarts by itself; what is let in runs on
                logger.warning("admission can't be told: %r", error)
                self._actor = None
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                pause_s = FOLLOWED_BEAT_S if any(self.waiting.values()) else BEAT_S
                await asyncio.wait_for(self._wake.wait(), pause_s)
