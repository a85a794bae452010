"""Closed-loop load from wrk: each client sends its next request as soon as it has its answer."""

from __future__ import annotations

import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
WORDS_FILE = HERE / "words.txt"
WARM_UP_S = 1
SETTLE_S = 1.0
"""Pause after a run: servers that don't notice a disconnect still answer the requests that wrk left behind."""
MIN_ANSWERS = 3
"""Answers per client. wrk does not count requests in flight at the end, which would be a large part of fewer."""
LONGEST_S = 40
PATIENCE_S = 60


@dataclass(frozen=True)
class Workload:
    """What the clients ask for: `items` texts per request, each of `shortest` to `longest` words."""

    name: str
    title: str
    clients: int
    items: int
    shortest: int
    longest: int
    words: Path = WORDS_FILE

    def texts(self, count: int, seed: int) -> list[str]:
        """Texts with the words and lengths that wrk sends."""
        return texts(count, self.shortest, self.longest, seed, self.words)


@dataclass(frozen=True)
class Measure:
    """One server under one workload. `failed` counts statuses other than 200 and requests without an answer."""

    items_per_s: float
    requests_per_s: float
    p50_ms: float | None = None
    p99_ms: float | None = None
    failed: int = 0


@dataclass(frozen=True)
class Responses:
    """One run of wrk. `failed` counts statuses other than 200 and requests without an answer."""

    count: int
    per_s: float
    p50_ms: float
    p99_ms: float
    refusals_p99_ms: float
    """The p99 of failed requests, if all of these were faster than any that was answered."""
    failed: int


def texts(count: int, shortest: int, longest: int, seed: int, words: Path = WORDS_FILE) -> list[str]:
    """Seeded texts of `shortest` to `longest` words."""
    draw, known = random.Random(seed), words.read_text(encoding="utf-8").split()
    return [" ".join(draw.choices(known, k=draw.randint(shortest, longest))) for _ in range(count)]


def load(url: str, body: str, workload: Workload, seconds: int) -> Measure:
    """Warm up, then measure for `seconds`, or longer if requests are too slow for that.

    Each TEXT and NUMBER in the JSON `body` is replaced by a fresh one.
    """
    _wrk(url, body, workload, WARM_UP_S)
    while True:
        time.sleep(SETTLE_S)
        measure = _wrk(url, body, workload, seconds)
        answers = measure.requests_per_s * seconds
        if answers >= MIN_ANSWERS * workload.clients or measure.failed or 2 * seconds > LONGEST_S:
            time.sleep(SETTLE_S)
            return measure
        seconds *= 2


def _wrk(url: str, body: str, workload: Workload, seconds: int) -> Measure:
    found = wrk(url, body, workload, seconds)
    answered = found.per_s * max(found.count - found.failed, 0) / max(found.count, 1)
    if not answered:
        return Measure(0, 0, failed=found.failed)
    return Measure(answered * workload.items, answered, found.p50_ms, found.p99_ms, found.failed)


def wrk(url: str, body: str, workload: Workload, seconds: int) -> Responses:
    """Run wrk for `seconds`, without warming up."""
    command = ["wrk", "-t1", f"-c{workload.clients}", f"-d{seconds}s", "--timeout", "30s"]
    command += ["-s", str(HERE / "fresh.lua"), url, "--", body]
    command += [str(workload.words), str(workload.shortest), str(workload.longest)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + PATIENCE_S, check=True, encoding="utf-8"
    )
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT"))
    count, microseconds, p50, p99, refusals_p99, failed = line.split()[1:]
    per_s = int(count) / int(microseconds) * 1e6
    return Responses(int(count), per_s, float(p50), float(p99), float(refusals_p99), int(failed))
