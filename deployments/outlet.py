"""A replica's line to the board."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from deployments.gpu_share import GpuUse
from deployments.load_progress import LoadEvent
from deployments.spec import Order


class Outlet(Protocol):
    """Reports a replica's state and receives orders. Only `open` blocks."""

    def open(
        self, model: str, replica: str, registry: Any, deploy: str, on_order: Callable[[Order], object]
    ) -> Order | None: ...

    def event(self, event: LoadEvent, copy: int = 0) -> None: ...

    def facts(self, facts: dict[str, Any], order: Order | None = None) -> None: ...

    def gpu(self, use: GpuUse) -> None: ...

    def refused(self, order: Order, reason: str) -> None: ...
