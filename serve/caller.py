"""Who sends a request, how long they wait and how they want the answer, as its headers say."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from serve import errors

DEFAULT_TENANT = "default"
TENANT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
TENANT = re.compile(TENANT_PATTERN)
TENANT_HEADER, TICKET_HEADER = "X-Tenant-ID", "X-Dure-Ticket"
TIMEOUT_HEADER = "X-Request-Timeout"
"""In seconds. Serve's own `x-request-timeout-seconds` is a synonym."""
EVENTS = "text/event-stream"


@dataclass(frozen=True)
class Caller:
    timeout_s: float
    deadline: float
    """As a time.monotonic() timestamp."""
    tenant: str = DEFAULT_TENANT
    ticket: str | None = None
    """From an earlier refusal."""
    follows: bool = False
    """Whether the client wants progress events."""
    sees_events: bool = False
    """Whether the client wants Dure's events in a stream of another API."""

    @classmethod
    def waiting(cls, timeout_s: float, tenant: str = DEFAULT_TENANT, ticket: str | None = None) -> Caller:
        """A caller whose deadline is `timeout_s` from now."""
        return cls(timeout_s, time.monotonic() + timeout_s, tenant, ticket)

    @classmethod
    def of(cls, headers: Iterable[tuple[bytes, bytes]], longest_s: float) -> Caller:
        """The caller that a request's raw headers describe. The timeout is at most `longest_s`. Raises DureError."""
        given: dict[bytes, str] = {}
        timeout_s = longest_s
        for name, value in headers:
            if name in READ:
                given[name] = value.decode("latin-1")
            elif name == b"x-request-timeout":
                timeout_s = min(timeout_s, _seconds(value.decode("latin-1")))
        tenant = given.get(b"x-tenant-id", DEFAULT_TENANT)
        if not TENANT.fullmatch(tenant):
            raise errors.invalid(
                f"{TENANT_HEADER} takes 1 to 64 letters, digits, dots, dashes and underscores, and starts with a "
                "letter or digit",
                TENANT_HEADER,
            )
        return cls(
            timeout_s,
            time.monotonic() + timeout_s,
            tenant,
            given.get(b"x-dure-ticket") or None,
            EVENTS in given.get(b"accept", "").lower(),
            given.get(b"x-dure-events", "").lower() == "true",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process goes the time that is left, as its clock is another, and no ticket: those are for queues
        of this one.
        """
        return Caller._arrived, (self.timeout_s, self.left_s(), self.tenant)

    @classmethod
    def _arrived(cls, timeout_s: float, left_s: float, tenant: str) -> Caller:
        return cls(timeout_s, time.monotonic() + left_s, tenant)

    def left_s(self) -> float:
        """Seconds to the deadline, at least 1 ms; late callers are refused downstream."""
        return max(0.001, self.deadline - time.monotonic())


READ = {b"x-tenant-id", b"x-dure-ticket", b"x-dure-events", b"accept"}


def _seconds(text: str) -> float:
    try:
        seconds = math.nan if "_" in text else float(text)  # Python reads 1_0 as 10
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise errors.invalid(f"{TIMEOUT_HEADER} is {text[:20]!r}; it takes a number of seconds above 0", TIMEOUT_HEADER)
    return seconds
