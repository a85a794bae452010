"""Prints measurements, and keeps the latest run of each benchmark as a section of RESULTS.md."""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.load import Measure, Workload

RESULTS = Path(__file__).with_name("RESULTS.md")
HEADER = "# Results\n\nWritten by the benchmarks of this folder; each run replaces its own section.\n"
COLUMNS = ("server", "settings", "req/s", "items/s", "p50 ms", "p99 ms", "failed", "Dure / it (lowest to highest)")


@dataclass(frozen=True)
class Result:
    """One measurement of one server."""

    name: str
    settings: str
    measure: Measure


@dataclass
class Report:
    """Everything measured in one run."""

    name: str
    title: str
    weights: str
    seconds: int
    rounds: int
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    omitted: list[str] = field(default_factory=list)
    rows: dict[Workload, dict[str, list[Result]]] = field(default_factory=dict)

    def took_part(self, name: str, versions: dict[str, str]) -> None:
        self.versions[name] = versions

    def left_out(self, why: str) -> None:
        print(f"Left out: {why}", flush=True)
        self.omitted.append(why)

    def add(self, workload: Workload, result: Result) -> None:
        self.rows.setdefault(workload, {}).setdefault(result.name, []).append(result)
        measure = result.measure
        print(
            f"{workload.name:<12} {result.name:<26} {measure.items_per_s:>8.0f} items/s"
            f" {_number(measure.p50_ms):>9} ms p50 {measure.failed:>5} failed",
            flush=True,
        )

    def finish(self) -> None:
        """Print the section and put it into RESULTS.md in place of the earlier one."""
        section = self._section()
        print(f"\n{section}")
        text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else HEADER
        begin, end = f"<!-- {self.name} -->\n", f"<!-- end of {self.name} -->\n"
        text = re.sub(f"\n{re.escape(begin)}.*?{re.escape(end)}", "", text, flags=re.DOTALL)
        RESULTS.write_text(f"{text}\n{begin}{section}{end}", encoding="utf-8")

    def _section(self) -> str:
        lines = [f"## {self.title}", ""]
        lines += [f"{datetime.date.today()}, {machine()}. {self.weights}"]
        lines += [f"Rounds of {self.seconds} s, alternating: {self.rounds}; medians, and ratios of the same round."]
        lines += ["Answers were checked, many in flight at once, before anything was timed.", ""]
        for name, found in self.versions.items():
            lines.append(f"- {name}: " + ", ".join(f"{package} {version}" for package, version in found.items()))
        lines += [f"- Left out: {why}" for why in self.omitted]
        for workload, servers in self.rows.items():
            lines += ["", f"### {workload.title}", "", _row(COLUMNS), _row(["---"] * 2 + ["---:"] * 6)]
            lines += [_row(_cells(workload, results, servers["Dure"])) for results in servers.values()]
        return "\n".join(lines) + "\n"


def _cells(workload: Workload, results: list[Result], dure: list[Result]) -> list[str]:
    measures = [result.measure for result in results]

    def median(value: Callable[[Measure], float | None]) -> float | None:
        values = [found for measure in measures if (found := value(measure)) is not None]
        return statistics.median(values) if values else None

    ratio = ""
    if results is not dure:
        pairs = zip(dure, results, strict=True)
        rates = [(ours.measure.items_per_s, its.measure.items_per_s) for ours, its in pairs]
        ratios = [ours / its for ours, its in rates if its]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "no answers"
    return [
        results[0].name,
        results[0].settings,
        _number(median(lambda measure: measure.requests_per_s)),
        _number(median(lambda measure: measure.items_per_s)),
        _number(median(lambda measure: measure.p50_ms)),
        _number(median(lambda measure: measure.p99_ms)),
        str(sum(measure.failed for measure in measures)),
        ratio,
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def machine() -> str:
    """The CPU, its cores and instruction sets, and the Python version."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    units = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx2") if flag in flags]
    return f"{cpu}, {os.cpu_count()} cores ({', '.join(units)}), Python {platform.python_version()}"
