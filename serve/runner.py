"""The process that holds the cluster of `dure serve`: a session of its own below the one that a person sees.

A signal to the terminal's process group does not reach it, so it can always stop in good order: on SIGTERM, or when
its standard input ends because the process above it has died. It tells what happens as JSON lines.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from serve.config_file import read_config


def main() -> None:
    config = read_config(Path(sys.argv[1]))
    log_folder = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: over.set())
    threading.Thread(target=_end_with_parent, args=(over,), daemon=True).start()

    _tell({"kind": "stage", "message": "Starting Ray"})
    from serve import cluster

    cluster.start()
    for number in (signal.SIGINT, signal.SIGTERM):  # ray.init has set its own
        signal.signal(number, lambda *_: over.set())
    try:
        if not over.is_set():
            _tell({"kind": "stage", "message": "Starting Serve"})
            cluster.deploy(config, log_folder)
            for event in cluster.follow(config, over.is_set):
                _tell(asdict(event))
        over.wait()
    finally:
        cluster.stop()


def _end_with_parent(over: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    over.set()


def _tell(event: dict[str, object]) -> None:
    try:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


if __name__ == "__main__":
    main()
