"""Many people typing, each over a WebSocket of their own, as in a browser's input field: `make bench-typing`.

Each types bursts of characters with pauses; the text is sent once nothing has been typed for a while. The server runs
the demo checkpoint. Afterwards the cost of idle connections is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass, field

import psutil
import websockets
from websockets.asyncio.client import ClientConnection, connect

from demo.next_word.check import heldout
from loadtests import servers
from loadtests.report import machine

BURST, KEY_S, PAUSE_S, DEBOUNCE_S = 5, 0.15, 2.0, 0.3
LAST_ANSWERS = 100
"""Longest wait for the last answers, in tenths of a second."""
OPENING = 50
"""Connections opened at once."""


@dataclass
class Seen:
    """What all clients saw."""

    sent: int = 0
    answered: list[float] = field(default_factory=list)
    """Seconds from input to answer."""
    overtaken: int = 0
    """Inputs replaced by a newer one before their answer came."""
    stale: int = 0
    """Answers to overtaken inputs."""
    errors: list[str] = field(default_factory=list)


@dataclass
class Field:
    """A client's input field."""

    socket: ClientConnection
    seen: Seen
    newest: int = 0
    waiting: dict[int, float] = field(default_factory=dict)
    """When each input without an answer was sent."""

    async def type(self, text: str, until: float, start_s: float) -> None:
        await asyncio.sleep(start_s)
        end = 1
        while time.monotonic() < until:
            for _ in range(BURST):
                end = end + 1 if end < len(text) else 1
                await asyncio.sleep(KEY_S)
            await asyncio.sleep(DEBOUNCE_S - KEY_S)
            await self._send(text[:end])
            await asyncio.sleep(PAUSE_S)

    async def _send(self, text: str) -> None:
        self.seen.overtaken += len(self.waiting)
        self.waiting.clear()
        self.newest += 1
        self.seen.sent += 1
        self.waiting[self.newest] = time.monotonic()
        await self.socket.send(json.dumps({"type": "input", "text": text, "id": self.newest}))

    async def listen(self) -> None:
        async for message in self.socket:
            answer = json.loads(message)
            if answer["type"] != "prediction":
                self.seen.errors.append(answer["message"])
            elif answer["id"] != self.newest:
                self.seen.stale += 1
            else:
                self.seen.answered.append(time.monotonic() - self.waiting.pop(self.newest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--idle", type=int, default=2000, help="connections that nobody types on")
    parser.add_argument("--ttl-s", type=float, default=60, help="how long the server keeps predictions; 0: no cache")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    model = {"task": "next_word", "source": "demo/next_word/checkpoint", "max_queue": 1024}
    server = servers.dure_with(
        "typing", {"predictor": model}, {"replicas": 1}, "/ws", more={"cache": {"ttl_s": options.ttl_s}}
    )
    print(machine())
    with server.running():
        url = server.url.replace("http", "ws")
        if failed := asyncio.run(_typing(url, options.clients, options.seconds)):
            sys.exit(failed)
        asyncio.run(_idle(url, options.idle))


async def _typing(url: str, clients: int, seconds: int) -> str:
    """What went wrong; empty if nothing did."""
    draw, seen = random.Random(0), Seen()
    texts = [f"{prefix} {word}" for prefix, word in heldout()]
    sockets = await _open(url, clients)
    fields = [Field(socket, seen) for socket in sockets]
    listening = [asyncio.create_task(each.listen()) for each in fields]
    until = time.monotonic() + seconds
    cycle_s = BURST * KEY_S + DEBOUNCE_S + PAUSE_S
    await asyncio.gather(*(each.type(draw.choice(texts), until, draw.uniform(0, cycle_s)) for each in fields))
    for _ in range(LAST_ANSWERS):
        if any(each.waiting for each in fields):
            await asyncio.sleep(0.1)
    unanswered = sum(len(each.waiting) for each in fields)
    await asyncio.gather(*(socket.close() for socket in sockets))
    closed = sum(isinstance(end, Exception) for end in await asyncio.gather(*listening, return_exceptions=True))
    times = [1000 * answered for answered in sorted(seen.answered)]
    print(f"\n{clients} clients for {seconds} s: {seen.sent} inputs, {len(times)} answered, {seen.overtaken} overtaken")
    print(
        f"p50 {statistics.median(times):.0f} ms, p95 {times[int(0.95 * len(times))]:.0f} ms, longest {times[-1]:.0f} ms"
    )
    print(f"{len(seen.errors)} errors, {closed} connections lost, {unanswered} inputs without an answer, "
          f"{seen.stale} answers to overtaken inputs")  # fmt: skip
    return "; ".join(seen.errors[:3]) or ("answers are missing" if unanswered or closed else "")


async def _idle(url: str, count: int) -> None:
    ingress = next(
        process for process in psutil.process_iter(["cmdline"]) if "ingress" in " ".join(process.info["cmdline"] or [])
        and "ServeReplica" in " ".join(process.info["cmdline"])
    )  # fmt: skip
    before = ingress.memory_info().rss
    sockets = await _open(url, count)
    await asyncio.sleep(2)
    spent, started = sum(ingress.cpu_times()[:2]), time.monotonic()
    await asyncio.sleep(30)
    share = (sum(ingress.cpu_times()[:2]) - spent) / (time.monotonic() - started)
    each = (ingress.memory_info().rss - before) / count
    print(f"{count} idle connections: {each / 1000:.0f} kB of the ingress each, {share:.1%} of a core for all")
    await asyncio.gather(*(socket.close() for socket in sockets))


async def _open(url: str, count: int) -> list[ClientConnection]:
    sockets: list[ClientConnection] = []
    while len(sockets) < count:
        numbers = range(len(sockets), min(len(sockets) + OPENING, count))
        sockets += await asyncio.gather(*(connect(f"{url}/client-{number}", max_queue=4) for number in numbers))
    return sockets


if __name__ == "__main__":
    try:
        main()
    except websockets.WebSocketException as error:
        sys.exit(f"a connection failed: {error}")
