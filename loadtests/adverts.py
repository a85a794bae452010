"""Adverts under load, on both databases, and while things die: `make bench-adverts`.

Clients take adverts through both stages. Then everything on record is checked: answers match their schema, each call
that started has a trace, no variant is left running, and each finished stage has its event delivered. In a second
round the vision replica is killed three times, and the database is unavailable for a few seconds.
"""

from __future__ import annotations

import argparse
import os
import signal
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import psutil
from pydantic import BaseModel, ValidationError

from demo.adverts.cases import Case
from demo.adverts.check import heldout
from loadtests import servers
from loadtests.report import machine
from serve.services.adverts.verdicts import Judgement, Validation
from serve.store import migrate
from tests.hook import Hook, hook_on
from tests.postgres import Postgres, postgres

TENANT = "loadtest"
MODEL = {"task": "vision", "source": "demo/adverts/checkpoint", "max_batch_items": 8, "max_queue": 64}
KILLS = 3
AWAY_S = 3.0
"""How long the database is unavailable."""
TRIES = 8
SETTLE_S = 60.0
"""Longest wait for leases to end and events to be delivered."""
LEASE_S = 10.0


@dataclass
class Seen:
    """What the clients saw."""

    seconds: list[float] = field(default_factory=list)
    codes: Counter[int] = field(default_factory=Counter)
    invalid: int = 0
    given_up: int = 0
    trace_ids: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Store:
    """A database, and how to make it unavailable for AWAY_S."""

    name: str
    url: str
    go_away: Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200, help="stages; an advert has two")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--databases", default="sqlite,postgresql")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(f"{machine()}; {options.requests} stages, {options.clients} clients, demo checkpoint")
    wrong: list[str] = []
    with ExitStack() as running:
        for name in options.databases.split(","):
            store = running.enter_context(_store(name))
            for troubled in (False, True):
                wrong += _round(store, options.requests, options.clients, troubled)
    if wrong:
        sys.exit("; ".join(wrong))


def _round(store: Store, requests: int, clients: int, troubled: bool) -> list[str]:
    """Run one round on one database; returns what went wrong."""
    with tempfile.TemporaryDirectory() as folder, hook_on(servers.free_port()) as hook:
        more = {
            "store": {"url": store.url, "assets": folder},
            "webhook": {"url": hook.url, "secret": hook.secret, "first_retry_s": 0.2},
            "adverts": {"lease_s": LEASE_S},
        }
        server = servers.dure_with("adverts", {"vision": MODEL}, {"replicas": 1}, "/api/yh/", more=more)
        cases = heldout(requests // 4 + 1)
        pairs = list(zip(cases[::2], cases[1::2], strict=True))[: requests // 2] * 2
        seen = Seen()
        with server.running(), httpx.Client(base_url=server.url, timeout=150) as client:
            client.delete("jobs", params={"tenant_id": TENANT}).raise_for_status()
            trouble = Trouble(store, server.port) if troubled else None
            started = time.monotonic()
            with ThreadPoolExecutor(clients) as pool:
                jobs = list(pool.map(lambda pair: _advert(client, seen, *pair), pairs[: requests // 2]))
            elapsed_s = time.monotonic() - started
            told = trouble.end() if trouble else "nothing dies"
            wrong = _look_at_record(client, seen, [job for job in jobs if job], hook)
        times = sorted(seen.seconds)
        print(f"\n{store.name}, {told}: {len(times)} stages in {elapsed_s:.0f} s, {len(times) / elapsed_s:.1f}/s, "
              f"p50 {statistics.median(times):.2f} s, p95 {times[int(0.95 * len(times))]:.2f} s; "
              f"answers by status {dict(seen.codes)}; given up {seen.given_up}")  # fmt: skip
        print("\n".join(f"  WRONG: {each}" for each in wrong) or "  nothing lost, nothing stuck", flush=True)
        return wrong


def _advert(client: httpx.Client, seen: Seen, first: Case, second: Case) -> str | None:
    """Take an advert through both stages, as a patient client does. Returns its job id."""
    data = {"tenant_id": TENANT, "desc_eng": first.prompt.rpartition("Copy: ")[2].partition("\n")[0]}
    made = _patiently(seen, lambda: client.post("jobs", data=data, files={"image": _png(first)}))
    if made is None:
        return None
    job = made.json()
    ids = {"tenant_id": TENANT, "job_id": job["job_id"], "job_variants_id": job["job_variants_id"]}
    _stage(client, seen, "llava/stage1/validate", ids, Validation)
    overlay = f"jobs/{job['job_id']}/variants/{job['job_variants_id']}/overlay"
    _patiently(seen, lambda: client.post(overlay, data={"tenant_id": TENANT}, files={"image": _png(second)}))
    _stage(client, seen, "llava/stage2/judge", ids, Judgement)
    return str(job["job_id"])


def _stage(client: httpx.Client, seen: Seen, path: str, ids: dict[str, str], shape: type[BaseModel]) -> None:
    started = time.monotonic()
    answer = _patiently(seen, lambda: client.post(path, json=ids))
    if answer is None:
        return
    seen.seconds.append(time.monotonic() - started)
    verdict = answer.json()
    seen.trace_ids.append(verdict["vlm_trace_id"])
    try:
        shape.model_validate({name: value for name, value in verdict.items() if name not in ("job_id", "vlm_trace_id")})
    except ValidationError:
        seen.invalid += 1


def _patiently(seen: Seen, request: Callable[[], httpx.Response]) -> httpx.Response | None:
    """Repeat a request until it succeeds, up to TRIES times. None if it never does."""
    for _ in range(TRIES):
        try:
            response = request()
        except httpx.TransportError:
            seen.codes[0] += 1
            time.sleep(1)
            continue
        seen.codes[response.status_code] += 1
        if response.is_success:
            return response
        time.sleep(float(response.headers.get("Retry-After", 1)))
    seen.given_up += 1
    return None


def _look_at_record(client: httpx.Client, seen: Seen, jobs: list[str], hook: Hook) -> list[str]:
    """What is wrong on record, once it has settled or SETTLE_S have passed."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        states, traces = _record(client, jobs)
        done = {each["vlm_trace_id"] for each in traces if each["response"] and "error" not in each["response"]}
        delivered = {call.event_id for call in list(hook.calls)}
        settled = not any(state.endswith("running") for state, _ in states) and done <= delivered
        if settled or time.monotonic() > deadline:
            break
        time.sleep(1)
    print(f"\n  variants {dict(Counter(state for state, _ in states))}; {len(traces)} traces, {len(done)} with a "
          f"verdict; {len(hook.calls)} deliveries of {len(delivered)} events")  # fmt: skip
    known = {trace["vlm_trace_id"] for trace in traces}
    problems = {
        "answers that violate the schema": seen.invalid,
        "answers without a trace": len(set(seen.trace_ids) - known),
        "answers with the same trace": len(seen.trace_ids) - len(set(seen.trace_ids)),
        "verdicts on record that no client received": len(done - set(seen.trace_ids)),
        "traces without a response": sum(trace["response"] is None for trace in traces),
        "variants left running": sum(state.endswith("running") for state, _ in states),
        "variants that failed without a reason": sum(
            state.endswith("failed") and not reason for state, reason in states
        ),
        "events not delivered": len(done - delivered),
        "requests given up": seen.given_up,
    }
    return [f"{count} {problem}" for problem, count in problems.items() if count]


def _record(client: httpx.Client, jobs: list[str]) -> tuple[list[tuple[str, str | None]], list[dict[str, Any]]]:
    """State and reason of each variant, and all traces."""
    states = []
    for job in jobs:
        shown = client.get(f"jobs/{job}", params={"tenant_id": TENANT}).raise_for_status().json()
        states += [(f"{each['step']}/{each['status']}", each["reason"]) for each in shown["variants"]]
    traces: list[dict[str, Any]] = []
    query: dict[str, Any] = {"tenant_id": TENANT, "limit": 500}
    while True:
        page = client.get("traces", params=query).raise_for_status().json()
        traces += page["traces"]
        if not page["next"]:
            return states, traces
        query["after"] = page["next"]


class Trouble:
    """Kills the vision replica KILLS times, and makes the database unavailable once."""

    def __init__(self, store: Store, port: int) -> None:
        self.store = store
        self.health = f"http://127.0.0.1:{port}/health"
        self.killed: list[float] = []
        """Seconds from each kill until another replica had loaded its model."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> str:
        self._over.set()
        self._thread.join()
        each = ", ".join(f"{seconds:.1f}" for seconds in self.killed)
        return f"{len(self.killed)} replicas killed (the next ready after {each} s), database away for {AWAY_S:g} s"

    def _run(self) -> None:
        for number in range(KILLS):
            self._over.wait(2)
            killed = _replica("vision")
            assert killed
            killed.send_signal(signal.SIGKILL)
            started = time.monotonic()
            while (other := _replica("vision")) is None or other.pid == killed.pid or not self._is_healthy():
                time.sleep(0.1)
            self.killed.append(time.monotonic() - started)
            if number == 1:
                self.store.go_away()

    def _is_healthy(self) -> bool:
        return httpx.get(self.health, timeout=10).is_success


def _replica(deployment: str) -> psutil.Process | None:
    """The process of a deployment of the server under test, which has one replica of each."""
    mark = str(servers.BENCH / "dure")
    for process in psutil.process_iter():
        try:
            is_it = any(f"ServeReplica:dure:{deployment}" in word for word in process.cmdline()[:1])
            if is_it and mark in process.environ().get("DURE_OWNER", ""):
                return process
        except psutil.Error:
            continue
    return None


@contextmanager
def _store(name: str) -> Iterator[Store]:
    """An empty, migrated database."""
    with ExitStack() as stack:
        if name == "sqlite":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            file = folder / "dure.sqlite3"
            store = Store(name, f"sqlite:///{file}", lambda: _lock(file))
        else:
            server = stack.enter_context(postgres(servers.free_port()))
            store = Store(name, server.database(), lambda: _restart(server))
        migrate.migrate(store.url)
        yield store


def _lock(file: Path) -> None:
    """Lock the database against all other writers, which comes closest to a restart."""
    connection = sqlite3.connect(file, timeout=10, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    time.sleep(AWAY_S)
    connection.execute("ROLLBACK")
    connection.close()


def _restart(server: Postgres) -> None:
    server.stop()
    time.sleep(AWAY_S)
    server.start()


def _png(case: Case) -> bytes:
    out = BytesIO()
    case.image().save(out, "PNG")
    return out.getvalue()


if __name__ == "__main__":
    main()
