"""Compares Dure with its peers in one run: alternating rounds, medians and ratios.

All servers run at once, and only one is loaded at a time; other peers are stopped meanwhile. Dure's cluster is not,
and takes about a tenth of a core when idle, which is to its peers' disadvantage.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from loadtests.bare import Bare
from loadtests.check import WrongAnswers
from loadtests.load import Measure, Workload, load
from loadtests.report import Report, Result
from loadtests.servers import NotStarted, Server, alone, served_as, versions

TUNE_S = 3
"""Seconds that each workload runs on each choice of a peer's settings, to find the best choice."""
BARE_ITEMS = 256

Choices = dict[str, Server]
"""A server for each workload, by the workload's name."""


@dataclass(frozen=True)
class Benchmark:
    """What is compared. `body` is the JSON in which wrk fills the blanks; `check` raises WrongAnswers."""

    name: str
    title: str
    weights: str
    workloads: list[Workload]
    body: Callable[[Workload], str]
    requests: Callable[[Workload, int], list[Any]]
    """Makes BARE_ITEMS requests for the bare engine from a seed."""
    task: str
    dure: Callable[[], Server]
    peers: dict[str, Callable[[], list[Server]]]
    """Each peer's choices of settings, made only when needed, because making them may install the peer."""
    check: Callable[[], Callable[[Server], None]]
    bare: Callable[[str, str], Bare]
    """Makes the bare engine in a precision on a runtime."""


def main(benchmark: Benchmark) -> None:
    options = _options(benchmark)
    if shutil.which("wrk") is None:
        sys.exit("wrk is needed: apt-get install wrk")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("stopped"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    workloads = [each for each in benchmark.workloads if each.name in options.workloads]
    report = Report(benchmark.name, benchmark.title, benchmark.weights, options.seconds, options.rounds)
    try:
        _measure(benchmark, workloads, options, report)
    except (WrongAnswers, NotStarted) as error:
        sys.exit(str(error))
    report.finish()


def _options(benchmark: Benchmark) -> argparse.Namespace:
    peers, workloads = [*benchmark.peers, "bare"], [workload.name for workload in benchmark.workloads]
    parser = argparse.ArgumentParser(description=f"{benchmark.title}: Dure beside its peers")
    parser.add_argument("--seconds", type=int, default=8, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", type=_some_of(peers), default=peers, help=f"peers, of {','.join(peers)}")
    parser.add_argument("--settings", default="", help="try only peers' settings that contain this, such as bf16")
    parser.add_argument("--workloads", type=_some_of(workloads), default=workloads, help=f"of {','.join(workloads)}")
    return parser.parse_args()


def _some_of(known: list[str]) -> Callable[[str], list[str]]:
    def parse(given: str) -> list[str]:
        names = given.split(",")
        unknown = set(names) - set(known)
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not among {', '.join(known)}")
        return names

    return parse


def _measure(benchmark: Benchmark, workloads: list[Workload], options: argparse.Namespace, report: Report) -> None:
    check = benchmark.check()
    made = [make() for name, make in benchmark.peers.items() if name in options.only]
    variants = [[each for each in choices if options.settings in each.settings] for choices in made]
    peers = [_best(benchmark, each, workloads, check, min(TUNE_S, options.seconds), report) for each in variants]
    dure = benchmark.dure()
    contenders: list[Choices] = [dict.fromkeys((workload.name for workload in workloads), dure), *peers]
    processes: dict[Server, subprocess.Popen[bytes]] = {}
    with ExitStack() as running:
        for server in dict.fromkeys(server for choices in contenders for server in choices.values()):
            print(f"Starting {server.name} ({server.settings})", flush=True)
            processes[server] = running.enter_context(server.running())
            with alone(server, processes):
                check(server)
            report.took_part(server.name, versions(server) | server.details)
        precision, runtime = served_as(dure, benchmark.task)
        dure_settings = f"{dure.settings}: {runtime} {precision}"
        with alone(dure, processes):
            bare = _bare(benchmark, workloads, precision, runtime) if "bare" in options.only else None
        for number in range(options.rounds):
            for workload in workloads:
                for choices in contenders:
                    server = choices[workload.name]
                    with alone(server, processes):
                        measure = load(server.url, benchmark.body(workload), workload, options.seconds)
                    settings = dure_settings if server is dure else server.settings
                    report.add(workload, Result(server.name, settings, measure))
                if bare:
                    with alone(dure, processes):
                        results = _bare_results(bare, workload, benchmark, number, options.seconds)
                    for result in results:
                        report.add(workload, result)


def _best(
    benchmark: Benchmark,
    variants: list[Server],
    workloads: list[Workload],
    check: Callable[[Server], None],
    seconds: int,
    report: Report,
) -> Choices:
    """A peer's best settings for each workload, each tried for `seconds`. Settings with wrong answers are left out."""
    tried: dict[str, list[tuple[float, Server]]] = {workload.name: [] for workload in workloads}
    for server in variants:
        with server.running():
            try:
                check(server)
            except WrongAnswers as wrong:
                report.left_out(str(wrong))
                continue
            for workload in workloads:
                measure = load(server.url, benchmark.body(workload), workload, seconds)
                tried[workload.name].append((measure.items_per_s, server))
        rates = ", ".join(f"{name} {rates[-1][0]:.0f}" for name, rates in tried.items())
        print(f"Tried {server.name} ({server.settings}), items/s: {rates}", flush=True)
    if any(not each for each in tried.values()):
        raise WrongAnswers(f"{variants[0].name} answers wrongly with all settings")
    return {name: max(each, key=lambda pair: pair[0])[1] for name, each in tried.items()}


def _bare(benchmark: Benchmark, workloads: list[Workload], precision: str, runtime: str) -> Bare:
    bare = benchmark.bare(precision, runtime)
    for workload in workloads:
        bare.tune(workload, lambda seed, workload=workload: benchmark.requests(workload, seed))  # type: ignore[misc]
    return bare


def _bare_results(bare: Bare, workload: Workload, benchmark: Benchmark, number: int, seconds: float) -> list[Result]:
    measures: tuple[Measure, Measure] = bare.measure(
        workload, lambda seed: benchmark.requests(workload, 1000 * number + seed), seconds
    )
    settings = f"{bare.runtime} {bare.precision}, batch {bare.batches[workload.name]}"
    names = ("bare engine, tokens ready", "bare engine")
    return [Result(name, settings, measure) for name, measure in zip(names, measures, strict=True)]
