"""Who asks, how long they will wait, and how they want to hear of it: what a request's headers say."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

from serve import errors

DEFAULT_TENANT = "default"
TENANT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
TENANT = re.compile(TENANT_PATTERN)
TENANT_HEADER, TICKET_HEADER = "X-Tenant-ID", "X-Dure-Ticket"
TIMEOUT_HEADER = "X-Request-Timeout"
"""In seconds. Serve's own `x-request-timeout-seconds` is taken for the same."""
EVENTS = "text/event-stream"


@dataclass(frozen=True)
class Caller:
    timeout_s: float
    deadline: float
    """On the clock of time.monotonic."""
    tenant: str = DEFAULT_TENANT
    ticket: str | None = None
    """From an earlier refusal."""
    follows: bool = False
    """Wants events of how far the request is."""

    @classmethod
    def waiting(cls, timeout_s: float, tenant: str = DEFAULT_TENANT, ticket: str | None = None) -> Caller:
        """One who has said nothing else."""
        return cls(timeout_s, time.monotonic() + timeout_s, tenant, ticket)

    @classmethod
    def of(cls, headers: Iterable[tuple[bytes, bytes]], longest_s: float) -> Caller:
        """What a request's raw headers say; nobody waits for more than `longest_s`. Raises DureError."""
        said: dict[bytes, str] = {}
        timeout_s = longest_s
        for name, value in headers:
            if name in READ:
                said[name] = value.decode("latin-1")
            elif name == b"x-request-timeout":
                timeout_s = min(timeout_s, _seconds(value.decode("latin-1")))
        tenant = said.get(b"x-tenant-id", DEFAULT_TENANT)
        if not TENANT.fullmatch(tenant):
            raise errors.invalid(
                f"{TENANT_HEADER} has 1 to 64 letters, digits, dots, dashes and underscores, and begins with one of "
                "the first two",
                TENANT_HEADER,
            )
        return cls(
            timeout_s,
            time.monotonic() + timeout_s,
            tenant,
            said.get(b"x-dure-ticket") or None,
            EVENTS in said.get(b"accept", "").lower(),
        )

    def left_s(self) -> float:
        """Until the deadline; a little is left to those who are late, who are told so further on."""
        return max(0.001, self.deadline - time.monotonic())


READ = {b"x-tenant-id", b"x-dure-ticket", b"accept"}


def _seconds(text: str) -> float:
    try:
        seconds = math.nan if "_" in text else float(text)  # Python reads 1_0 as 10
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise errors.invalid(f"{TIMEOUT_HEADER} is {text[:20]!r}; it takes seconds, more than 0", TIMEOUT_HEADER)
    return seconds
