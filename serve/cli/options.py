"""Shared by all commands: where they print, how they fail, and the --config option."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from serve.config.file import ConfigFile, read_config
from serve.failures import MACHINE, printable

out = Console()
problems = Console(stderr=True)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="A config file; see configs/.")]
DEFAULT_CONFIG = Path("configs/local.yaml")


def read(config: Path) -> ConfigFile:
    """Read the config file given on the command line. Raises SettingsError."""
    return read_config(config.absolute())  # other processes read it again, from another working directory


def complain(message: str) -> None:
    """Print what is wrong. The terminal wraps long lines."""
    shown = "\n".join(map(printable, message.splitlines()))
    problems.print(shown, style="bold red", highlight=False, markup=False, soft_wrap=True)


def fail(message: str, code: int = MACHINE) -> NoReturn:
    """Print what is wrong and exit; serve.failures has the exit codes."""
    complain(message)
    raise typer.Exit(code)
