"""What processes report to the board, and what the board tells its listeners."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from deployments.gpu_share import GpuUse
from deployments.load_progress import LoadEvent
from deployments.spec import Order

BEAT_S = 1.0
SILENCE_S = 10.0
"""A replica that is silent for this long is gone: ten beats, as loading may hold the interpreter for seconds."""
DIED = "the process died while loading"
LISTEN_S = 5.0
HISTORY = 4096
Key = tuple[str, str]
"""A model's name and a replica's id."""


@dataclass(frozen=True)
class Replica:
    """State of one replica of a model."""

    model: str
    replica: str
    event: LoadEvent
    facts: dict[str, Any] | None = None
    process: str = ""
    """If this is a second copy, the replica that loads it; else empty."""
    overload: str = ""
    """Why its machine should be given no more work; empty if it may be."""
    gpu: GpuUse | None = None


@dataclass(frozen=True)
class Report:
    """The full state of the model that a process serves."""

    model: str
    process: str
    deploy: str = ""
    step: int = 0
    """Counts reports that say something new, as Ray may deliver two of them in the wrong order."""
    states: dict[str, Replica] = field(default_factory=dict)
    """By name: the replica itself, and the copy that it loads."""
    order: Order | None = None
    """The last order to reload that the process has carried out."""
    begun: int = 0
    """Number of the last order that it has begun."""
    refused: tuple[Order, str] | None = None
    """The last order that it could not carry out, and why; it keeps serving as before."""

    @property
    def serves(self) -> bool:
        return self.process in self.states and self.states[self.process].event.status == "ready"


@dataclass(frozen=True)
class Changes:
    """What a listener has missed: states in order, None if a replica is gone. If `whole`, these are all states."""

    epoch: str
    sequence: int
    whole: bool
    states: list[tuple[Key, Replica | None]]
    stops: int = 0
    """How often the application has been about to stop."""


CONSTRUCTOR_TRIES = 2
"""How often Serve tries to start a replica before the deployment fails for good."""
