"""`dure bench`: which batch size and which precision suit a model on this machine. No server has to run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from deployments.spec import CheckpointError, ModelSpec
from serve import environment
from serve.config_file import read_config
from serve.strict import SettingsError, unknown_name

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Measure a config's model on this machine."
)
out = Console()

ModelArgument = Annotated[str, typer.Argument(help="A model of the config.")]
ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="A config file; see configs/.")]
SizesOption = Annotated[str, typer.Option(help="Batch sizes to try, in items.")]

DEFAULT_CONFIG = Path("configs/local.yaml")


@app.callback()
def prepare() -> None:
    # torch reads its environment when it is imported.
    environment.apply({"OMP_WAIT_POLICY": environment.EVERYWHERE["OMP_WAIT_POLICY"]})


@app.command("batch-sizes")
def batch_sizes(
    model: ModelArgument, config: ConfigOption = DEFAULT_CONFIG, sizes: SizesOption = "1,2,4,8,16,32,64,128"
) -> None:
    """Items a second for batches of several sizes, and the one to take."""
    spec = _spec(model, config)
    try:
        counts = sorted({int(size) for size in sizes.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1:
        _fail(f"--sizes {sizes!r} is no list of whole numbers from 1, such as 1,8,32")
    from deployments import benchmarks

    measured = _measured(lambda: benchmarks.batch_sizes(spec, counts))
    table = Table("tokens an item", "items", "ms", "items/s", "memory", title=_title(spec, measured.facts))
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
    """Memory, speed and quality of the original and of each optimised form."""
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
            out.print(f"{each['precision']} on {each['runtime']}: {each['reason']}", highlight=False)
    out.print(f"auto serves {choice['precision']} on {choice['runtime']}", highlight=False, style="bold")


def _spec(model: str, config: Path) -> ModelSpec:
    try:
        models = read_config(config.resolve()).settings.models
    except SettingsError as error:
        _fail(str(error))
    if model not in models:
        _fail(f"{config}: {unknown_name(model, 'model', list(models))}")
    return models[model].spec(model)


def _measured(measure: Any) -> Any:
    try:
        return measure()
    except (ValueError, CheckpointError) as error:
        _fail(str(error))


def _title(spec: ModelSpec, facts: Any) -> str:
    threads = f", {spec.threads} threads" if spec.threads else ""
    return f"{spec.name}: {facts.precision} on {facts.runtime}, {facts.device}{threads}, {os.cpu_count()} cores"


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(message, style="bold red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(2)
