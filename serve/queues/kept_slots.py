"""Slots kept for tenants that have just left a lane and may be back at once with their next request."""

from __future__ import annotations

import time
from dataclasses import dataclass

SOON = 0.1
"""Fraction of a service time. A tenant back within it is back at once; a slot is kept no longer than this."""


@dataclass
class Gap:
    """The time after a tenant's request in which its next one still comes at once."""

    tenant: str
    until: float
    """On the clock of time.monotonic."""
    keeps_slot: bool


class KeptSlots:
    """A client that sends one request after another has nothing queued at the moment its slot becomes free.

    If the slot went to another tenant each time, the client would wait for a slot each time (Iyer and Druschel's
    anticipatory scheduling 2001).
    """

    def __init__(self) -> None:
        self._gaps: list[Gap] = []

    @property
    def kept(self) -> list[str]:
        """Tenants with a kept slot, once per slot."""
        return [gap.tenant for gap in self._current() if gap.keeps_slot]

    def expect(self, tenant: str, service_time_s: float, keep_slot: bool) -> float:
        """A request of the tenant's has ended. Returns for how many seconds its next one is expected."""
        soon_s = SOON * service_time_s
        self._gaps.append(Gap(tenant, time.monotonic() + soon_s, keep_slot))
        return soon_s

    def came(self, tenant: str) -> Gap | None:
        """The gap that a tenant's new request ends; None if it did not come at once."""
        gaps = [gap for gap in self._current() if gap.tenant == tenant]
        gap = max(gaps, key=lambda gap: gap.keeps_slot, default=None)
        if gap:
            self._gaps.remove(gap)
        return gap

    def _current(self) -> list[Gap]:
        now = time.monotonic()
        self._gaps = [gap for gap in self._gaps if gap.until > now]
        return self._gaps
