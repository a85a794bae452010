"""Prints a plan."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from serve.planning.plan import Need, Plan, gib


def print_plan(console: Console, plan: Plan) -> None:
    """Print what each model takes and books, and a line for each GPU with the replicas on it."""
    table = Table("model", "replicas", "weights", "cache", "activations", "CUDA", "all", "booked", "least num_gpus")
    size = min(gpu.memory_bytes for gpu in plan.gpus)
    for need in plan.needs:
        parts, least = [""] * 5, ""
        if isinstance(need, Need):
            takes = need.footprint
            parts = [*map(gib, (takes.weights, takes.cache, takes.activations, takes.context, takes.total))]
            least = f"{need.least(size):.2f}"
        booked = _mark(need.worked_out) + gib(need.booked * size)
        table.add_row(need.model, str(need.replicas), *parts, booked, least)
    console.print(table)
    for gpu in plan.gpus:
        bar = "".join(f"[{need.model} {_mark(need.worked_out)}{need.on_each:.0%}]" for need in gpu.replicas)
        console.print(f"GPU {gpu.number}  {bar}  {gpu.free:.0%} free", highlight=False, markup=False, soft_wrap=True)


def _mark(worked_out: bool) -> str:
    """The mark before a share that Dure worked out because the config leaves it out."""
    return "~" if worked_out else ""
