"""A Ray cluster of several nodes on one machine, started with `ray start` as on several machines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from serve.operate.environment import joining_environment, local_environment
from tests.dure import ROOT, free_port, ports_of_its_own

START_S = 90
NODE = "DURE_TEST_NODE"
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "12",
}
"""Ray detects a lost node after about 5 s instead of 20 s, and an ingress drains for 12 s instead of 30 s. In that time
HAProxy must notice, which takes seconds on a busy machine."""


class Nodes:
    """The nodes of a cluster, numbered from 0, the head. All share one port; the kernel picks a node per connection."""

    def __init__(self, state: Path, **environment: str) -> None:
        self.gcs = free_port()
        self.sockets = Path(tempfile.mkdtemp(prefix="dure-test-"))
        mark = {"DURE_OWNER": f"0:0:{state}", "SERVE_SOCKET_REUSE_PORT_ENABLED": "1"}
        mark["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"  # Ray's switch for several nodes at 127.0.0.1
        self.environment = local_environment(self.sockets) | QUICK | mark | ports_of_its_own() | environment
        self.count = 0

    def add(self, cpus: float, gpus: float = 0) -> int:
        """Start a node with these CPUs and GPUs, which Ray only counts, and return its number."""
        at = ["--head", f"--port={self.gcs}", "--include-dashboard=false"]
        if self.count:
            at = [f"--address=127.0.0.1:{self.gcs}"]
        ports = [
            "--node-ip-address=127.0.0.1",
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--dashboard-agent-listen-port=0",
            "--include-log-monitor=false",
        ]
        size = [f"--num-cpus={cpus:g}", f"--num-gpus={gpus:g}", f"--object-store-memory={100 * 2**20}"]
        started = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *at, *ports, *size, "--disable-usage-stats"],
            env={
                **os.environ,
                **(joining_environment() if self.count else {}),
                **self.environment,
                NODE: f"{self.gcs}.{self.count}",
            },
            cwd=ROOT,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            timeout=START_S,
        )
        assert started.returncode == 0, started.stdout
        self.count += 1
        return self.count - 1

    @property
    def address(self) -> dict[str, str]:
        """Environment of a command that connects to the cluster."""
        return self.environment | {"RAY_ADDRESS": f"127.0.0.1:{self.gcs}"}

    def processes(self, node: int | None = None) -> Iterator[psutil.Process]:
        """All processes of a node, or of all nodes."""
        for process in psutil.process_iter():
            try:
                mark = process.environ().get(NODE, "") if process.status() != psutil.STATUS_ZOMBIE else ""
            except (psutil.Error, OSError):
                continue
            if mark.startswith(f"{self.gcs}.") and (node is None or mark == f"{self.gcs}.{node}"):
                yield process

    def actors(self, title: str) -> dict[psutil.Process, int]:
        """Processes of actors with `title` in their command line, and the nodes they run on."""
        found = {}
        for process in self.processes():
            try:
                if title in " ".join(process.cmdline()):
                    found[process] = int(process.environ()[NODE].rpartition(".")[2])
            except (psutil.Error, OSError):
                continue
        return found

    def kill(self, node: int) -> None:
        """Kill a node's processes, as if its machine were gone."""
        for process in self.processes(node):
            process.kill()

    def stop(self) -> None:
        deadline = time.monotonic() + 20
        while left := list(self.processes()):
            for process in left:
                process.kill()
            psutil.wait_procs(left, 2)
            assert time.monotonic() < deadline
        shutil.rmtree(self.sockets, ignore_errors=True)
