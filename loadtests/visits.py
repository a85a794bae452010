"""Many requests at once from one small process, in an open or a closed loop; refused requests are repeated."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

PATIENCE_S = 150.0

Body = Callable[[], bytes]
"""Makes a fresh JSON body on each call."""


def prepared(make: Callable[[], Any], count: int) -> Body:
    """Make `count` bodies beforehand, because making one takes longer than sending it; any others on demand."""
    ready = iter([orjson.dumps(make()) for _ in range(count)])
    return lambda: next(ready, None) or orjson.dumps(make())


@dataclass(frozen=True)
class Try:
    """One request, from sending it to its answer."""

    at: float
    """Seconds since the start of the run."""
    seconds: float
    status: int
    """0 if there was no answer."""
    with_ticket: bool
    retry_after_s: float = 0.0
    ticket: str | None = None


@dataclass
class Tries:
    """All requests of a run of `run_s` seconds."""

    run_s: float
    of: list[Try] = field(default_factory=list)

    def answered(self) -> list[Try]:
        return [each for each in self.of if each.status == 200]

    def refused(self) -> list[Try]:
        return [each for each in self.of if each.status in (429, 503)]

    def failed(self) -> list[Try]:
        return [each for each in self.of if each.status not in (200, 429, 503)]

    def with_ticket(self) -> list[Try]:
        return [each for each in self.of if each.with_ticket]

    def goodput(self) -> float:
        """Answers per second during the run."""
        return sum(each.at + each.seconds <= self.run_s for each in self.answered()) / self.run_s


def quantile(tries: list[Try], share: float) -> float:
    """A quantile of their seconds; 0 if there are none."""
    times = sorted(each.seconds for each in tries)
    return times[min(len(times) - 1, int(share * len(times)))] if times else 0.0


def median(tries: list[Try]) -> float:
    return statistics.median(each.seconds for each in tries) if tries else 0.0


class Visits:
    """Sends bodies to one URL."""

    def __init__(self, session: aiohttp.ClientSession, url: str, body: Body, run_s: float, **headers: str) -> None:
        self.session = session
        self.url = url
        self.body = body
        self.headers = headers | {"Content-Type": "application/json"}
        self.started = time.monotonic()
        self.tries = Tries(run_s)

    @property
    def over(self) -> bool:
        return time.monotonic() - self.started >= self.tries.run_s

    async def send(self, body: bytes, ticket: str | None = None) -> Try:
        headers = self.headers | ({"X-Dure-Ticket": ticket} if ticket else {})
        began = time.monotonic()
        status, retry_after_s, given = 0, 0.0, None
        try:
            async with self.session.post(self.url, data=body, headers=headers) as response:
                await response.read()
                status = response.status
                retry_after_s = float(response.headers.get("Retry-After", 0))
                given = response.headers.get("X-Dure-Ticket")
        except (aiohttp.ClientError, TimeoutError):
            pass
        made = Try(began - self.started, time.monotonic() - began, status, bool(ticket), retry_after_s, given)
        self.tries.of.append(made)
        return made

    async def visit(self, tries: int = 10) -> None:
        """Ask until there is an answer, the run is over, or the request has been refused `tries` times."""
        body, ticket = self.body(), None
        for _ in range(tries):
            made = await self.send(body, ticket)
            if made.status not in (429, 503):
                return
            ticket = made.ticket
            left_s = self.started + self.tries.run_s - time.monotonic()
            await asyncio.sleep(min(made.retry_after_s, max(0.0, left_s)))
            if self.over:
                return

    async def closed(self, clients: int) -> Tries:
        """Run so many clients, each sending its next request as soon as it has its answer."""

        async def client() -> None:
            while not self.over:
                await self.visit()

        await asyncio.gather(*(client() for _ in range(clients)))
        return self.tries

    async def open(self, rate: float) -> Tries:
        """Send new requests at this rate, however earlier ones fare; the times between are exponential."""
        draw = random.Random(0)
        under_way: set[asyncio.Task[None]] = set()
        due = time.monotonic()
        while not self.over:
            due += draw.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self.visit())
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)
        return self.tries


def run(scenario: Callable[[aiohttp.ClientSession], Coroutine[Any, Any, Any]]) -> Any:
    """Run a scenario with a session that opens as many connections as there are requests."""

    async def main() -> Any:
        connector = aiohttp.TCPConnector(limit=0, force_close=False)
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            return await scenario(session)

    return asyncio.run(main())
