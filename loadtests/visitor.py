"""A user of Dure in the load test, who checks every answer and comes back when told to.

A 429 or 503 with Retry-After is a refusal. It is not a failure, and has a request type of its own in Locust's
statistics. A refused user waits as long as it says and asks again, with the ticket if there is one.
"""

from __future__ import annotations

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import gevent
from locust import FastHttpUser
from locust.stats import RequestStats, StatsEntry

TRIES = 4
"""Times that a user asks for the same before giving up."""
PATIENCE_S = 150.0
TICKET = "X-Dure-Ticket"
REFUSED = " refused"
"""Suffix of the request type for refusals."""
SHOWN = 160
"""Characters shown of an unexpected answer."""

PAUSES: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
"""The seconds of Retry-After, by name and type of the request."""

Right = Callable[[Any], bool]
"""Whether an answer is right. It is wrong, too, if this raises one of WRONG."""
WRONG = (LookupError, TypeError, ValueError, AttributeError)


class Visitor(FastHttpUser):
    """A user who asks Dure over HTTP."""

    abstract = True
    network_timeout = PATIENCE_S

    def ask(self, method: str, path: str, right: Right, *, name: str = "", **content: Any) -> Any:
        """The answer, JSON or text; None if the request failed or was refused TRIES times."""
        headers = content.pop("headers", {})
        for _ in range(TRIES):
            with self.client.request(
                method, path, name=name or path, headers=headers, catch_response=True, **content
            ) as response:
                pause_s = pause_asked(response.status_code, (response.headers or {}).get("Retry-After"))
                if pause_s is None:
                    return _checked(response, right)
                PAUSES[name or path, method].append(pause_s)
                response.request_meta["request_type"] += REFUSED
                response.success()
                if ticket := response.headers.get(TICKET):
                    headers = {**headers, TICKET: ticket}
            gevent.sleep(pause_s)
        return None


def pause_asked(status: int, retry_after: str | None) -> float | None:
    """Seconds to wait if a request was refused, else None."""
    return float(retry_after) if status in (429, 503) and retry_after else None


def _checked(response: Any, right: Right) -> Any:
    """The answer; None if there is none or it is wrong, which is then reported as a failure."""
    if not response.status_code:  # no connection, which Locust has counted
        return None
    if 200 <= response.status_code < 300:
        with contextlib.suppress(*WRONG):
            is_json = response.headers.get("Content-Type", "").startswith("application/json")
            answer = response.json() if is_json else response.text
            if right(answer):
                return answer
    response.failure(f"{response.status_code}: {' '.join(str(response.text).split())[:SHOWN]}")
    return None


def table(stats: RequestStats) -> str:
    """A Markdown table with a line for each endpoint. Times are those of answered requests."""
    head = ("endpoint", "requests", "/s", "p50 ms", "p95 ms", "p99 ms", "failed", "refused", "Retry-After s")
    rows = [head, ("---", *["---:"] * (len(head) - 1))]
    known = {(entry.name, entry.method.removesuffix(REFUSED)) for entry in stats.entries.values()}
    rows += [_row(stats, *which) for which in sorted(known)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"| {' | '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])} |" for row in rows
    )


def _row(stats: RequestStats, name: str, method: str) -> tuple[str, ...]:
    heard: StatsEntry = stats.get(name, method)
    refused: StatsEntry = stats.get(name, method + REFUSED)
    requests = heard.num_requests + refused.num_requests
    pauses = PAUSES[name, method]
    times = map(heard.get_response_time_percentile, (0.5, 0.95, 0.99))
    return (
        f"{method} {name}",
        str(requests),
        f"{heard.total_rps + refused.total_rps:.1f}",
        *(f"{time_ms:.0f}" if heard.num_requests else "" for time_ms in times),
        str(heard.num_failures),
        f"{refused.num_requests} ({refused.num_requests / requests:.0%})" if refused.num_requests else "0",
        f"{statistics.median(pauses):g}" if pauses else "",
    )
