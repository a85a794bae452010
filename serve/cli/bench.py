"""`dure bench`: which batch size and which precision suit a model on this machine. Needs no running server."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.table import Table

from deployments.spec import ModelSpec
from serve.cli.options import DEFAULT_CONFIG, ConfigOption, fail, out, read
from serve.config.base import SettingsError, unknown_name
from serve.failures import CONFIG, one_line
from serve.operate import environment

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Measure a config's model on this machine."
)
ModelArgument = Annotated[str, typer.Argument(help="A model of the config.")]
SizesOption = Annotated[str, typer.Option(help="Batch sizes to try, in items.")]

MOST_ITEMS = 10_000
"""Largest batch size to try, the limit of max_batch_items."""
Measured = TypeVar("Measured")


@app.callback()
def prepare() -> None:
    # torch reads its environment when it is imported.
    environment.apply({"OMP_WAIT_POLICY": environment.EVERYWHERE["OMP_WAIT_POLICY"]})


@app.command("batch-sizes")
def batch_sizes(
    model: ModelArgument, config: ConfigOption = DEFAULT_CONFIG, sizes: SizesOption = "1,2,4,8,16,32,64,128"
) -> None:
    """Measure items per second for several batch sizes, and recommend one."""
    spec = _spec(model, config)
    try:
        counts = sorted({int(size) for size in sizes.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1 or counts[-1] > MOST_ITEMS:
        raise SettingsError(f"--sizes {sizes!r} is not a list of whole numbers from 1 to {MOST_ITEMS}, such as 1,8,32")
    from deployments import benchmarks

    measured = _measured(lambda: benchmarks.batch_sizes(spec, counts))
    table = Table("tokens per item", "items", "ms", "items/s", "memory", title=_title(spec, measured.facts))
    for size in measured.sizes:
        table.add_row(
            str(size.length),
            str(size.items),
            f"{1000 * size.seconds:.1f}",
            f"{size.items_per_s:.0f}",
            f"{size.memory_mb:.0f} MB",
        )
    out.print(table)
    best = [measured.recommended(length) for length in measured.lengths]
    items, tokens = max(size.items for size in best), max(size.tokens for size in best)
    out.print(f"max_batch_items: {items}, max_batch_tokens: {tokens}", highlight=False, style="bold")
    out.print("The smallest batches within 5 % of the best throughput, for short items and for long ones.")


@app.command("precision")
def precision(model: ModelArgument, config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Compare memory, speed and quality of the original and of each optimised form."""
    spec = _spec(model, config)
    from deployments import benchmarks

    choice = _measured(lambda: benchmarks.precisions(spec))
    candidates: list[dict[str, Any]] = choice["quality"]["candidates"]
    metrics = list(candidates[0]["metrics"])
    table = Table("runtime", "precision", "memory", "1 item", "32 short", "8 long", *metrics, "verdict")
    for each in candidates:
        speeds = each["items_per_s"]
        table.add_row(
            each["runtime"],
            each["precision"],
            "" if each["weights_mb"] is None else f"{each['weights_mb']:.1f} MB",
            f"{1000 / speeds['single']:.1f} ms" if speeds else "",
            f"{speeds['short']:.0f}/s" if speeds else "",
            f"{speeds['long']:.0f}/s" if speeds else "",
            *(f"{each['metrics'][name]:.4f}" if name in each["metrics"] else "" for name in metrics),
            each["verdict"],
        )
    out.print(table)
    for each in candidates:
        if each["reason"]:
            line = f"{each['precision']} on {each['runtime']}: {each['reason']}"
            out.print(line, highlight=False, markup=False, soft_wrap=True)
    out.print(f"auto serves {choice['precision']} on {choice['runtime']}", highlight=False, style="bold")


def _spec(model: str, config: Path) -> ModelSpec:
    models = read(config).settings.models
    if model not in models:
        raise SettingsError(f"{config}: {unknown_name(model, 'model', list(models))}")
    return models[model].spec(model)


def _measured(measure: Callable[[], Measured]) -> Measured:
    try:
        return measure()
    except ValueError as error:
        fail(one_line(str(error)), CONFIG)


def _title(spec: ModelSpec, facts: Any) -> str:
    threads = f", {spec.threads} threads" if spec.threads else ""
    return f"{spec.name}: {facts.precision} on {facts.runtime}, {facts.device}{threads}, {os.cpu_count()} cores"
