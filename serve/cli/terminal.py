"""Shows how models load or are fetched: a live bar per model, or plain lines without a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from serve.config.file import ConfigFile
from serve.config.tasks import task_of

ALWAYS = ["GET /health", "GET /v1/models", "GET /model/upload-stream", "GET /metrics", "GET /docs"]


class Loading:
    """Draws the progress of loading models."""

    def __init__(self, console: Console, models: Iterable[str]) -> None:
        self.console = console
        self.bars: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.said: dict[str, str] = {}
        if console.is_terminal:
            self.bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.fields[model]:<12}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[message]}", markup=False),
                TimeElapsedColumn(),
                console=console,
            )
            self.tasks = {name: self.bars.add_task("", total=100, model=name, message="waiting") for name in models}

    def drawn(self) -> AbstractContextManager[object]:
        return self.bars or nullcontext()

    def stage(self, message: str) -> None:
        self.console.print(message, style="dim", highlight=False, markup=False, soft_wrap=True)

    def progress(self, model: str, percent: float, message: str) -> None:
        if self.bars is not None and model in self.tasks:
            self.bars.update(self.tasks[model], completed=percent, message=message)
        elif self.said.get(model) != message.partition("...")[0]:  # one line per shard, not per percent
            self.said[model] = message.partition("...")[0]
            self.console.print(f"{model}: {percent:.0f}% {message}", highlight=False, markup=False, soft_wrap=True)


class Fetching:
    """Draws how many bytes of each title have been fetched."""

    def __init__(self, console: Console, bytes_of: dict[str, int]) -> None:
        self.console = console
        self.bytes_of = bytes_of
        self.done = dict.fromkeys(bytes_of, 0)
        self.bars: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        if console.is_terminal:
            columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self.bars = Progress(TextColumn("{task.description:<12}"), BarColumn(), *columns, console=console)
            self.tasks = {title: self.bars.add_task(title, total=total) for title, total in bytes_of.items()}

    def drawn(self) -> AbstractContextManager[object]:
        return self.bars or nullcontext()

    def came(self, title: str, count: int) -> None:
        """Record that `count` more bytes have been fetched."""
        before, total = self.done[title], self.bytes_of[title]
        self.done[title] = now = before + count
        if self.bars is not None:
            self.bars.update(self.tasks[title], completed=now)
        elif 10 * now // total > 10 * before // total:  # one line per tenth
            self.console.print(f"{title}: {100 * now // total}% of {decimal(total)}", highlight=False)


def print_ready(console: Console, config: ConfigFile) -> None:
    """Print the address, the endpoints, and a curl command to try."""
    settings = config.settings
    tasks = {name: task_of(model.task) for name, model in settings.models.items()}
    endpoints = [endpoint.format(name=name) for name, task in tasks.items() for endpoint in task.endpoints]
    endpoints += [endpoint for name in settings.active_services for endpoint in settings.entry(name).endpoints]
    console.print(f"Ready: {config.url}", style="bold green", highlight=False)
    for endpoint in dict.fromkeys(endpoints + ALWAYS):
        console.print(f"  {endpoint}", highlight=False, markup=False)
    path, body = next((task.example for task in tasks.values() if task.example), ("/v1/models", ""))
    data = f" -H 'Content-Type: application/json' -d '{body}'" if body else ""
    console.print(f"Try:\n  curl {config.url}{path}{data}", highlight=False, markup=False, soft_wrap=True)
