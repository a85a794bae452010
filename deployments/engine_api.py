"""The API for engines outside Dure. These names are stable. Other modules may change at any time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deployments.engines.contract import Engine, Stepping, Work
from deployments.load_progress import LoadProgress
from deployments.spec import CheckpointError, Facts, ItemError, ModelSpec

if TYPE_CHECKING:
    from deployments.checkpoints.loading import load_model

__all__ = [
    "CheckpointError",
    "Engine",
    "Facts",
    "ItemError",
    "LoadProgress",
    "ModelSpec",
    "Stepping",
    "Work",
    "load_model",
]


def __getattr__(name: str) -> Any:
    """Import `load_model` on first use: it imports torch, which some engines do not need."""
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deployments.checkpoints.loading import load_model

    return load_model
