"""How fast a full queue refuses: `make bench-refusals`.

A few clients keep the queue of the shipped config's embedder full with long lists, and the engine busy. Meanwhile wrk
sends short texts with many clients, nearly all of which are refused. Server, load and engine share the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import threading
from dataclasses import astuple
from typing import Any

import aiohttp

from loadtests import servers
from loadtests.load import Responses, Workload, texts, wrk
from loadtests.report import machine

CLIENTS = 100
MAX_QUEUE = 64
FILLING, LIST = 4, 512
"""Clients that keep the queue full, and the texts of each of their requests."""
SETTLE_S = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    document = servers.shipped()
    document["applications"][0]["args"]["models"]["embedder"]["max_queue"] = MAX_QUEUE
    server = servers.dure_from(document, "refusals", "/v1/embeddings")
    workload = Workload("refused", "", CLIENTS, 1, 12, 12)
    rounds = []
    with server.running():
        over = threading.Event()
        filling = threading.Thread(target=lambda: asyncio.run(fill(server.url, over)))
        filling.start()
        over.wait(SETTLE_S)
        try:
            for _ in range(options.rounds):
                rounds.append(wrk(server.url, '{"input": "TEXT"}', workload, options.seconds))
        finally:
            over.set()
            filling.join()
    middle = Responses(*(statistics.median(column) for column in zip(*map(astuple, rounds), strict=True)))
    print(f"{machine()}: {CLIENTS} clients at a full queue, medians of {options.rounds} rounds of {options.seconds} s")
    print(
        f"{middle.failed / middle.count:.1%} refused, {middle.per_s:.0f} responses/s, p50 {middle.p50_ms:.1f} ms, "
        f"p99 of the refusals {middle.refusals_p99_ms:.1f} ms, of all {middle.p99_ms:.1f} ms"
    )


async def fill(url: str, over: threading.Event) -> None:
    """Keep the queue full until it is over."""
    body: dict[str, Any] = {"input": texts(LIST, 12, 60, 1)}

    async def client(session: aiohttp.ClientSession) -> None:
        while not over.is_set():
            async with session.post(url, json=body) as response:
                await response.read()
            if response.status != 200:
                await asyncio.sleep(0.5)

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client(session) for _ in range(FILLING)))


if __name__ == "__main__":
    main()
