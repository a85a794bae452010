"""Load that rises and falls: how soon replicas start and stop, and whether anything is lost.

The model takes a tenth of a second per item, one item at a time, and scales to zero while nobody asks for it. Clients
come and go as in PROFILE. Load and replicas are sampled twice a second, and drawn as a graph with the latencies.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from loadtests import servers
from loadtests.report import machine
from loadtests.visits import Tries, Visits, quantile, run

PROFILE = ((5, 0), (25, 2), (45, 24), (25, 2), (40, 0))
"""Seconds, and the clients during them: from no replica to one, to three, and back to none."""
SCALING = {
    "min_replicas": 0,
    "max_replicas": 3,
    "target_ongoing_requests": 8,
    "look_back_period_s": 3,
    "upscale_delay_s": 2,
    "downscale_delay_s": 8,
}
MODEL = {"task": "loadtests.simulated:Simulated", "source": "configs", "max_batch_items": 1, "max_queue": 256}
SAMPLE_S = 0.5
PATH = "/v1/models/slow/run"


@dataclass(frozen=True)
class Sample:
    at: float
    clients: int
    replicas: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graph", type=Path, default=servers.BENCH / "scaling.png")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    server = servers.dure_with("scaling", {"slow": MODEL | {"autoscaling": SCALING}}, {"replicas": 1}, PATH)
    print(f"{machine()}; {', '.join(f'{name} {value:g}' for name, value in SCALING.items())}")
    with server.running():
        samples, tries = run(lambda session: _profile(session, server))
    draw(samples, tries, options.graph)
    failed = [each for each in tries.of if each.status != 200]
    answered = tries.answered()
    print(f"{len(answered)} answered, {len(failed)} not; p50 {quantile(answered, 0.5):.2f} s, "
          f"p95 {quantile(answered, 0.95):.2f}; first answer after {answered[0].seconds:.1f} s from zero")  # fmt: skip
    starts = [0.0, *itertools.accumulate(seconds for seconds, _ in PROFILE)]
    for number, (start, (_, clients)) in enumerate(zip(starts, PROFILE, strict=False)):
        changes = [each for each in samples if start <= each.at < starts[number + 1]]
        steps = [(each.at - start, each.replicas) for before, each in itertools.pairwise(changes)
                 if each.replicas != before.replicas]  # fmt: skip
        told = ", ".join(f"{replicas} after {at:.1f} s" for at, replicas in steps) or "no change"
        print(f"  {clients} clients: {told}")
    print(f"Graph: {options.graph}")
    most = max(each.replicas for each in samples)
    if failed or most < SCALING["max_replicas"] or samples[-1].replicas:
        sys.exit(f"{len(failed)} failed, at most {most} replicas, {samples[-1].replicas} at the end")


async def _profile(session: aiohttp.ClientSession, server: servers.Server) -> tuple[list[Sample], Tries]:
    seconds = sum(each for each, _ in PROFILE)
    visits = Visits(session, server.url, lambda: b'{"items": [0]}', seconds)
    samples: list[Sample] = []
    wanted = 0

    async def watch() -> None:
        while True:
            async with session.get(f"http://127.0.0.1:{server.port}/v1/models/slow") as response:
                known = (await response.json())["replicas"]
            ready = sum(replica["status"] == "ready" for replica in known)
            samples.append(Sample(time.monotonic() - visits.started, wanted, ready))
            await asyncio.sleep(SAMPLE_S)

    async def client(number: int) -> None:
        while number < wanted:
            await visits.visit()

    watching = asyncio.create_task(watch())
    clients: list[asyncio.Task[None]] = []
    for lasts_s, count in PROFILE:
        already, wanted = wanted, count
        clients += [asyncio.create_task(client(number)) for number in range(already, count)]
        await asyncio.sleep(lasts_s)
    await asyncio.gather(*clients)
    watching.cancel()
    return samples, visits.tries


def draw(samples: list[Sample], tries: Tries, path: Path) -> None:
    """Draw clients, replicas and latencies over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(9, 6))
    at = [each.at for each in samples]
    above.step(at, [each.clients for each in samples], where="post", color="tab:grey", label="clients")
    above.set_ylabel("clients")
    replicas = above.twinx()
    replicas.step(at, [each.replicas for each in samples], where="post", color="tab:blue", label="replicas")
    replicas.set_ylabel("replicas ready", color="tab:blue")
    replicas.set_ylim(0, 4)
    answered = tries.answered()
    below.scatter([each.at + each.seconds for each in answered], [each.seconds for each in answered], s=4)
    below.set_yscale("log")
    below.set_ylabel("seconds to the answer")
    below.set_xlabel("seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
