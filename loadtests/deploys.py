"""Deploys another config and rolls it back under load, on three nodes: what fails, and how long requests wait."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from loadtests.outages import CLIENTS, Load
from loadtests.report import machine
from tests.cluster.test_nodes import READY_S, production
from tests.dure import Dure, free_port
from tests.nodes import Nodes

BEFORE_S = 10.0
OTHER = {"search": {"replicas": 2, "num_cpus": 0.5, "max_concurrent": 3, "max_queue": 7}}


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder, other = (Path(tempfile.mkdtemp(prefix="dure-deploys-")) for _ in range(2))
    nodes = Nodes(folder)
    try:
        nodes.add(cpus=3)
        for _ in range(2):
            nodes.add(cpus=4, gpus=1)
        port = free_port()
        deploying = Dure(production(folder, port), folder, port, **nodes.address)
        if deploying.ended(READY_S):
            sys.exit(deploying.said)
        print(f"{machine()}; 3 nodes on these cores, 2 ingress replicas, {CLIENTS} clients")
        failed = _run(nodes, deploying, production(other, port, **OTHER))
    finally:
        nodes.stop()
    if failed:
        sys.exit(f"{failed} requests failed")


def _run(nodes: Nodes, dure: Dure, other: Path) -> int:
    load = Load(dure.url)
    clients = [threading.Thread(target=load.run) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        time.sleep(BEFORE_S)
        for kind, words in (("deploy", ("serve", "--config", str(other))), ("rollback", ("rollback",))):
            load.kind = kind
            before, started = len(load.seconds), time.monotonic()
            told = Dure.command(dure, *words, seconds=READY_S)
            took_s = time.monotonic() - started
            if told.returncode:
                sys.exit(told.stdout + told.stderr)
            time.sleep(BEFORE_S)
            times = sorted(load.seconds[before:])
            print(f"{kind}: {took_s:.0f} s, {len(times)} requests, {load.failed_once[kind]} failed, longest "
                  f"{times[-1]:.1f} s", flush=True)  # fmt: skip
    finally:
        load.over.set()
        for client in clients:
            client.join()
    for reason, count in load.reasons.items():
        print(f"  {count} times {reason}")
    return load.failed_once.total()


if __name__ == "__main__":
    main()
