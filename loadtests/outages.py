"""Kills processes and a node of a cluster under load, one after the other: what fails, and for how long.

Three nodes run on this machine, with two ingress replicas. A steady number of clients searches through one port. In
turn a model's replica, the admission actor, an ingress replica, a HAProxy and a node get a SIGKILL, each once the one
before has recovered. A client repeats a refused or lost request once; repeats are counted separately.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from loadtests.report import machine
from tests.cluster.test_nodes import READY_S, production
from tests.dure import Dure, free_port
from tests.nodes import NODE, Nodes

CLIENTS = 6
PAUSE_S = 0.05
RETRY_S = 1.0
"""Wait of a client before it asks again, if the answer names no other."""
SHARE = 0.45
"""Share of a GPU, so that one GPU holds a replica of each model. Ray places replicas by the sum of what is free on a
node: with 0.4 free on each of two GPUs, a replica that needs 0.6 waits forever."""
BETWEEN_S = 5.0
RECOVER_S = 90.0
REPLICA_S = 10.0
"""Longest recovery of a model's replica, with loading the model, which is quick here."""
INGRESS, HAPROXY = "ServeReplica:dure:ingress", "haproxy -"
ATTEMPTS = 200
GOOD_IN_A_ROW = 10
"""An outage is over after this many answers without a failure in between."""


@dataclass
class Load:
    """What the clients saw."""

    url: str
    kind: str = "none"
    """Kind of the last outage."""
    answered: Counter[str] = field(default_factory=Counter)
    failed_once: Counter[str] = field(default_factory=Counter)
    failed_again: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    last_failure: float = 0.0
    in_a_row: int = 0
    unwanted: frozenset[int] = frozenset()
    """Client ports whose connections are to be opened anew."""
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self.over.is_set():
            with httpx.Client(timeout=60) as client:
                while not self.over.wait(PAUSE_S) and self._ask(client) not in self.unwanted:
                    pass

    def _ask(self, client: httpx.Client) -> int | None:
        """Search once, and once more if it fails. Returns the client port, or None without a connection."""
        stamp = time.monotonic_ns()
        body = {"query": f"Who pays {stamp}?", "documents": [f"{stamp} the tenant pays", "It rains."], "top_k": 1}
        began = time.monotonic()
        for failed in (self.failed_once, self.failed_again):
            asked_from, problem = self._try(client, body)
            if problem is None:
                self.answered[self.kind] += 1
                self.seconds.append(time.monotonic() - began)
                self.in_a_row += 1
                return asked_from
            failed[self.kind] += 1
            self.reasons[f"{self.kind}: {problem}"] += 1
            self.last_failure, self.in_a_row = time.monotonic(), 0
        return asked_from

    def _try(self, client: httpx.Client, body: dict[str, object]) -> tuple[int | None, str | None]:
        try:
            with client.stream("POST", f"{self.url}/v1/search", json=body) as response:
                asked_from = int(response.extensions["network_stream"].get_extra_info("client_addr")[1])
                response.read()
        except httpx.HTTPError as error:
            time.sleep(RETRY_S)
            return None, type(error).__name__
        if response.is_success:
            return asked_from, None
        time.sleep(float(response.headers.get("Retry-After", RETRY_S)))
        return asked_from, f"{response.status_code} {response.text[:90]}"


@dataclass(frozen=True)
class Outage:
    kind: str
    kill: Callable[[], None]
    is_back: Callable[[], bool]
    prepare: Callable[[], None] = lambda: None
    """Runs before the kill and is not measured."""
    may_fail_once: bool = False
    at_most_s: float = RECOVER_S


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=240, help="least duration of the load")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="dure-outages-"))
    nodes = Nodes(folder)
    try:
        nodes.add(cpus=2)
        for _ in range(2):
            nodes.add(cpus=4, gpus=1)
        port = free_port()
        deploying = Dure(production(folder, port, replicas=2, share=SHARE), folder, port, **nodes.address)
        if deploying.ended(READY_S):
            sys.exit(deploying.said)
        print(f"{machine()}; 3 nodes on these cores, 2 ingress replicas, {CLIENTS} clients")
        wrong = _run(nodes, port, deploying.url, options.seconds)
    finally:
        nodes.stop()
    if wrong:
        sys.exit("; ".join(wrong))


def _run(nodes: Nodes, port: int, url: str, seconds: int) -> list[str]:
    load = Load(url)
    clients = [threading.Thread(target=load.run) for _ in range(CLIENTS)]
    started = time.monotonic()
    for client in clients:
        client.start()
    wrong: list[str] = []
    try:
        time.sleep(BETWEEN_S)
        for outage in _outages(nodes, load, port):
            wrong += _suffer(outage, load)
        time.sleep(max(0.0, started + seconds - time.monotonic()))
    finally:
        load.over.set()
        for client in clients:
            client.join()
    times = sorted(load.seconds)
    p99_s, elapsed_s = times[int(0.99 * len(times))], time.monotonic() - started
    print(
        f"{load.answered.total()} answers in {elapsed_s:.0f} s, p50 {statistics.median(times):.2f} s, p99 {p99_s:.2f}, "
        f"longest {times[-1]:.1f}"
    )
    for reason, count in load.reasons.items():
        print(f"  {count} times {reason}")
    return wrong


def _suffer(outage: Outage, load: Load) -> list[str]:
    outage.prepare()
    load.kind, killed_at = outage.kind, time.monotonic()
    outage.kill()
    load.in_a_row = 0
    while not (outage.is_back() and load.in_a_row >= GOOD_IN_A_ROW):
        if time.monotonic() - killed_at > RECOVER_S:
            return [f"{outage.kind}: not back after {RECOVER_S:g} s"]
        time.sleep(0.1)
    back_s = time.monotonic() - killed_at
    time.sleep(BETWEEN_S)  # failures until the next kill count as this outage's, too
    failing_s = max(0.0, load.last_failure - killed_at)
    once, again = load.failed_once[outage.kind], load.failed_again[outage.kind]
    print(f"{outage.kind}: {once} requests failed once, {again} again; failures for {failing_s:.1f} s, as many "
          f"processes as before after {back_s:.1f} s", flush=True)  # fmt: skip
    problems = {
        f"{again} failed twice": again,
        f"{once} failed": once and not outage.may_fail_once,
        f"back after {back_s:.1f} s": back_s > outage.at_most_s,
    }
    return [f"{outage.kind}: {problem}" for problem, is_so in problems.items() if is_so]


def _outages(nodes: Nodes, load: Load, port: int) -> list[Outage]:
    return [
        _process(nodes, "model replica", "ServeReplica:dure:embedder", at_most_s=REPLICA_S),
        _process(nodes, "admission", "Admission"),
        _process(nodes, "ingress replica", INGRESS, may_fail_once=True),
        _process(nodes, "HAProxy", HAPROXY, may_fail_once=True),
        _node(nodes, load, port, with_ingress=False),
        _node(nodes, load, port, with_ingress=True),
    ]


def _process(nodes: Nodes, kind: str, title: str, **more: Any) -> Outage:
    before: dict[psutil.Process, int] = {}

    def kill() -> None:
        before.update(nodes.actors(title))
        min(before, key=lambda process: before[process] == 0).kill()

    def is_back() -> bool:
        now = nodes.actors(title)
        return len(now) >= len(before) and now.keys() != before.keys()

    return Outage(kind, kill, is_back, **more)


def _node(nodes: Nodes, load: Load, port: int, with_ingress: bool) -> Outage:
    """Kills a node other than the head, after another node has joined to replace it."""
    kind = "node with an ingress" if with_ingress else "node without an ingress"
    titles = [INGRESS, *(f"ServeReplica:dure:{name}" for name in ("embedder", "reranker", "search"))]
    victim = 0
    wanted: list[int] = []

    def prepare() -> None:
        nonlocal victim
        doors = set(nodes.actors(INGRESS).values())
        workers = {int(process.environ()[NODE].rpartition(".")[2]) for process in nodes.processes()} - {0}
        chosen = workers & doors if with_ingress else workers - doors
        if not chosen:
            sys.exit(f"{kind}: there is none, because of where Serve placed the ingress; run this again")
        victim = min(chosen)
        wanted[:] = [len(nodes.actors(title)) for title in titles]
        nodes.add(cpus=4, gpus=1)
        if not with_ingress:
            leave()

    def leave() -> None:
        """Move all client connections away from the victim, as a load balancer in front of the ingress nodes would.

        Serve runs a HAProxy on every node with a replica, and on one machine the kernel chooses among them.
        """
        for _ in range(ATTEMPTS):
            of_clients = {end.laddr for end in psutil.Process().net_connections("tcp") if end.raddr}
            ends = {
                end.raddr.port: node
                for process, node in nodes.actors(HAPROXY).items()
                for end in process.net_connections("tcp")
                if end.laddr.port == port and end.raddr in of_clients
            }
            load.unwanted = frozenset(asked_from for asked_from, node in ends.items() if node == victim)
            if len(ends) == CLIENTS and not load.unwanted:
                return
            time.sleep(PAUSE_S)
        sys.exit(f"{kind}: clients are still connected to it")

    def is_back() -> bool:
        return [len(nodes.actors(title)) for title in titles] == wanted

    return Outage(kind, lambda: nodes.kill(victim), is_back, prepare, may_fail_once=with_ingress)


if __name__ == "__main__":
    main()
