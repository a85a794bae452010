"""Commands that ask a running server: `dure status` and `dure predict`."""

from __future__ import annotations

import os
from typing import Annotated
from urllib.parse import quote

import typer
from rich.markup import escape
from rich.table import Table

from serve.cli import asking
from serve.cli.options import out
from serve.config.base import SettingsError
from serve.failures import printable

UrlOption = Annotated[str, typer.Option(envvar="DURE_URL", help="Where Dure answers.")]

DEFAULT_URL = "http://127.0.0.1:8000"
PREDICT_S = 150.0
"""A request waits while its model loads."""


def status(url: UrlOption = DEFAULT_URL) -> None:
    """Show the models with their replicas, state, precision and memory."""
    table = Table("model", "task", "state", "replicas", "device", "precision", "memory", "loaded in")
    for entry in asking.ask(asking.Models, url, "/v1/models").data:
        model = asking.ask(asking.Model, url, f"/v1/models/{quote(entry.id, safe='')}")
        replicas = [each for each in model.replicas if "/" not in each.replica]  # without copies that a reload makes
        ready = sum(each.status == "ready" for each in replicas)
        row = [
            model.id,
            model.task,
            model.state,
            f"{ready}/{len(replicas)}",
            model.device or "",
            (model.precision or "") + (" (fallback)" if model.fallback_reason else ""),
            "" if model.memory_mb is None else f"{model.memory_mb:.1f} MB",
            "" if model.load_seconds is None else f"{model.load_seconds:.1f} s",
        ]
        table.add_row(*(escape(printable(cell)) for cell in row))
    out.print(table)


def predict(
    text: str,
    top_k: Annotated[int, typer.Option(min=1, max=50)] = 5,
    url: UrlOption = DEFAULT_URL,
) -> None:
    """Print the most likely next words of a Korean text."""
    try:
        text = os.fsencode(text).decode()  # the terminal's bytes, however the locale decoded them
    except UnicodeError as error:
        raise SettingsError("the text is not UTF-8") from error
    answer = asking.ask(asking.Words, url, "/predict", {"text": text, "top_k": top_k}, PREDICT_S)
    for word in answer.predictions:
        out.print(f"{word.confidence:6.1%}  {text}{printable(word.append)}", highlight=False, markup=False)
