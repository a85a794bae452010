"""What a start or a deploy tells the person who waits for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from serve.failures import MACHINE


@dataclass(frozen=True)
class StartEvent:
    """A new stage, a replica's progress, or the end."""

    kind: Literal["stage", "progress", "ready", "failed"]
    message: str
    model: str = ""
    progress: float = 0.0
    code: int = MACHINE
    """Exit code, for a failure."""
