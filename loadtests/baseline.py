"""Requests per second of a running Dure, closed loop, no request repeated: `python -m loadtests.baseline`.

It measures no peer, so compare it only with itself on the same machine.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import ray
import torch
import transformers

URL = os.environ.get("DURE_URL", "http://127.0.0.1:8000")
CLIENTS = 32
SECONDS = 8
ROUNDS = 3

WORDS = "the deposit of number NUMBER is due when the lease ends in spring"
CASES = {
    "/v1/embeddings": {"input": WORDS},
    "/predict": {"text": "NUMBER 오늘 날씨가"},
    "/v1/rerank": {
        "query": "when is deposit NUMBER due",
        "documents": [f"{WORDS}, part {part} of the contract" for part in range(4)],
    },
}


def measure(path: str, clients: int) -> tuple[float, float, float, int]:
    """Requests per second, p50 and p99 in milliseconds, and how many requests failed."""
    body = json.dumps(CASES[path], ensure_ascii=False)
    script = Path(__file__).with_name("fresh.lua")
    command = ["wrk", "-t1", f"-c{clients}", f"-d{SECONDS}s", "--timeout", "30s", "-s", str(script), URL + path, body]
    command.insert(-1, "--")
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 60, check=True, encoding="utf-8")
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT"))
    requests, microseconds, p50, p99, errors = line.split()[1:]
    return int(requests) / int(microseconds) * 1e6, float(p50), float(p99), int(errors)


def main() -> None:
    if shutil.which("wrk") is None:
        sys.exit("wrk is needed: apt-get install wrk")
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    print(f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, ray {ray.__version__}, ", end="")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{ROUNDS} rounds of {SECONDS} s, alternating, medians; 4 documents per rerank request")
    print(f"{'endpoint':<16} {'clients':>7} {'req/s':>8} {'p50 ms':>8} {'p99 ms':>8} {'failed':>7}")
    for clients in (1, CLIENTS):
        rounds = [{path: measure(path, clients) for path in CASES} for _ in range(ROUNDS)]
        for path in CASES:
            rate, p50, p99, errors = (statistics.median(each[path][column] for each in rounds) for column in range(4))
            print(f"{path:<16} {clients:>7} {rate:>8.0f} {p50:>8.1f} {p99:>8.1f} {errors:>7.0f}")


if __name__ == "__main__":
    main()
