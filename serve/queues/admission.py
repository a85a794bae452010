"""The actor that admits requests to the cluster's lanes.

A slot is only held while its holder says so: each ingress reports every second what it has waiting and running, and one
that falls silent loses its slots. So no lost call or process holds a slot for long, and if this actor is lost, the next
one learns what is running before it admits more.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from serve.actors import only
from serve.queues.gate import GateStanding
from serve.queues.lane import Asked, Decision, Entry, Lane
from serve.roster import Roster

NAME = "dure-admission"
BEAT_S = 1.0
"""How often each holder reports."""
SILENCE_S = 5.0
"""A holder that is silent for this long is gone: five beats, because loaded machines skip some."""
SWEEP_S = 0.25
"""How often silent holders and passed deadlines are looked for."""
LEARN_S = 2.5 * BEAT_S
"""After a start nothing is admitted for this long, so that holders can report what an earlier actor admitted."""
LEFT_KEPT_S = 10.0
"""Requests that left are remembered for this long, because Ray may deliver `leave` before the `enter` it follows."""


@dataclass(frozen=True)
class TurnedAway:
    """A tenant's newcomers that a process refused by itself, because admission had just refused one of them."""

    lane: str
    tenant: str
    count: int
    seconds: float
    """Time it will take to serve them."""


@dataclass(frozen=True)
class LaneReport:
    """A process's report: all it has in lanes, what waits in it for models, what it turned away since the last one."""

    holder: str
    running: list[Asked]
    waiting: list[str]
    """Ids of the requests."""
    models: list[GateStanding]
    turned_away: list[TurnedAway] = field(default_factory=list)


@dataclass(frozen=True)
class LaneReply:
    """The reply to a process's report."""

    key: bytes
    """Signs the tickets of all processes; it outlives a restart."""
    places: dict[str, tuple[int, float]]
    """Place, from 1, and estimated wait in seconds of each waiting request, by id."""


class Admission:
    """The state of all lanes, and of the processes that hold or wait for slots in them. Only one runs in a cluster."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.lanes: dict[str, Lane] = {}
        self.entries: dict[str, Entry] = {}
        self.roster: Roster[str] = Roster(SILENCE_S)
        self.models: dict[str, list[GateStanding]] = {}
        """The gates of models in each process, by holder."""
        self.left: dict[str, float] = {}
        """When each request left (time.monotonic), by id."""
        self.learning_until = time.monotonic() + LEARN_S
        self.sweeping: asyncio.Task[None] | None = None

    async def enter(self, asked: Asked) -> Decision:
        """Wait until it is decided whether a request is admitted, refused, too late or gone. Idempotent."""
        if asked.id in self.left:
            return "gone"
        self._hear(asked.holder)
        entry = self.entries.get(asked.id)
        if entry is None:
            entry = self._lane(asked.lane).enter(asked)
            self.entries[asked.id] = entry
        decision = await entry.decision
        if decision != "admitted":
            self.entries.pop(asked.id, None)
        return decision

    async def leave(self, id: str) -> None:
        """End a request, whether it was running or waiting. An `enter` that comes later has no effect."""
        self.left[id] = time.monotonic()
        self._release(id)

    async def report(self, report: LaneReport) -> LaneReply:
        """Take in a process's report. Its requests that go unreported for two beats are released."""
        self._hear(report.holder)
        self.models[report.holder] = report.models
        now = time.monotonic()
        for away in report.turned_away:
            if away.lane in self.lanes:
                self.lanes[away.lane].turned_away(away.tenant, away.count, away.seconds)
        for asked in report.running:
            if asked.id not in self.entries and asked.id not in self.left:
                self.entries[asked.id] = self._lane(asked.lane).resume(asked)
        held = {*(asked.id for asked in report.running), *report.waiting}
        lanes = set()
        for id, entry in list(self.entries.items()):
            if entry.asked.holder != report.holder:
                continue
            if id in held:
                entry.seen_at = now
                lanes.add(entry.asked.lane)
            elif now - entry.seen_at > 2 * BEAT_S:
                self._release(id)
        waiting = set(report.waiting)
        places = [place for lane in lanes for place in self.lanes[lane].places().items()]
        return LaneReply(self.key, {id: place for id, place in places if id in waiting})

    async def queues(self) -> dict[str, Any]:
        """State of each lane, and what waits for models in each process."""
        lanes = {name: asdict(lane.standing()) for name, lane in self.lanes.items()}
        return {"lanes": lanes, "models": [asdict(each) for models in self.models.values() for each in models]}

    def _lane(self, name: str) -> Lane:
        if name not in self.lanes:
            self.lanes[name] = Lane(name, self.key)
            self.lanes[name].paused = time.monotonic() < self.learning_until
        return self.lanes[name]

    def _hear(self, holder: str) -> None:
        self.roster.hear(holder)
        if self.sweeping is None:
            self.sweeping = asyncio.create_task(self._sweep())

    def _release(self, id: str) -> None:
        entry = self.entries.pop(id, None)
        if entry is not None:
            self.lanes[entry.asked.lane].leave(entry)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            for holder in self.roster.silent():
                self.models.pop(holder, None)
                lost = [(id, entry) for id, entry in self.entries.items() if entry.asked.holder == holder]
                # Waiting ones first, as a slot that is released goes to the next that waits.
                for id, _ in sorted(lost, key=lambda pair: pair[1].admitted_at is not None):
                    self._release(id)
            while self.left and now - next(iter(self.left.values())) > LEFT_KEPT_S:
                del self.left[next(iter(self.left))]
            for lane in self.lanes.values():
                if lane.paused and now >= self.learning_until:
                    lane.paused = False
                    lane.fill()
                lane.expire()


def admission() -> Any:
    """The cluster's admission actor, started if there is none."""
    return only(Admission, NAME, secrets.token_bytes(32))
