"""How fast a lone client gets a prediction from the cache, in memory and in Redis: `make bench-cache`.

One Dure with each cache, and one without, are asked in turn for the same words again and again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from loadtests import servers
from loadtests.load import Workload, load
from loadtests.report import machine

MODELS = {"predictor": {"task": "next_word", "source": "demo/next_word/checkpoint"}}
BODY = json.dumps({"text": "오늘 날씨가"}, ensure_ascii=False)
LONE = Workload("lone", "1 client", 1, 1, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if missing := [command for command in ("wrk", "redis-server") if shutil.which(command) is None]:
        sys.exit(f"needed: apt-get install {' '.join(missing)}")
    print(machine())
    with ExitStack() as running:
        settings: dict[str, dict[str, Any]] = {
            "off": {"ttl_s": 0},
            "memory": {"url": "memory://"},
            "Redis": {"url": running.enter_context(_redis())},
        }
        times: dict[str, list[float]] = {name: [] for name in settings}
        for _ in range(options.rounds):
            for name, cache in settings.items():
                server = servers.dure_with("cache", MODELS, {"replicas": 1}, "/predict", more={"cache": cache})
                with server.running():
                    measure = load(server.url, BODY, LONE, options.seconds)
                if measure.failed or measure.p50_ms is None:
                    sys.exit(f"{measure.failed} requests failed with the cache {name}")
                times[name].append(measure.p50_ms)
                print(f"{name:<8} p50 {measure.p50_ms:6.2f} ms  p99 {measure.p99_ms:6.2f} ms", flush=True)
    for name, found in times.items():
        print(f"{name}: p50 {statistics.median(found):.2f} ms, median of {options.rounds}")


@contextmanager
def _redis() -> Iterator[str]:
    """Run a Redis for this benchmark; yields its address."""
    port = servers.free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
            process.wait(10)


if __name__ == "__main__":
    main()
