"""Tenants that have just left a lane and, as they did before, may be back at once with their next request."""

from __future__ import annotations

import time
from dataclasses import dataclass

SOON = 0.1
"""Of a service time: who is back by then is back at once, and so long a slot may be kept for it at most."""


@dataclass
class Gap:
    """After one request of a tenant's, until it is too late for the next one to come at once."""

    tenant: str
    until: float
    """On the clock of time.monotonic."""
    keeps_slot: bool


class Returns:
    """A client that asks one thing after the other has nothing in the queue at the moment when its slot is free.

    Given to another each time, it would wait for a slot each time (Iyer and Druschel's anticipatory scheduling 2001).
    """

    def __init__(self) -> None:
        self._gaps: list[Gap] = []

    @property
    def kept(self) -> list[str]:
        """Tenants that a slot is kept for, each as often as it has one."""
        return [gap.tenant for gap in self._current() if gap.keeps_slot]

    def expect(self, tenant: str, service_time_s: float, keep_slot: bool) -> float:
        """Of a tenant that leaves: seconds for which its next one is expected, with its slot where that is kept."""
        soon_s = SOON * service_time_s
        self._gaps.append(Gap(tenant, time.monotonic() + soon_s, keep_slot))
        return soon_s

    def came(self, tenant: str) -> Gap | None:
        """What it is back after, if it is back at once."""
        gaps = [gap for gap in self._current() if gap.tenant == tenant]
        gap = max(gaps, key=lambda gap: gap.keeps_slot, default=None)
        if gap:
            self._gaps.remove(gap)
        return gap

    def _current(self) -> list[Gap]:
        now = time.monotonic()
        self._gaps = [gap for gap in self._gaps if gap.until > now]
        return self._gaps
