"""What all commands have in common: where they print, how they fail, and the option that names a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from serve.config.file import ConfigFile, read_config
from serve.failures import MACHINE

out = Console()
problems = Console(stderr=True)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="A config file; see configs/.")]
DEFAULT_CONFIG = Path("configs/local.yaml")


def read(config: Path) -> ConfigFile:
    """The config file that a person named. Raises SettingsError."""
    return read_config(config.absolute())  # processes that read it again have another working directory


def complain(message: str) -> None:
    """Say what is wrong; long lines are left to the terminal to break."""
    problems.print(message, style="bold red", highlight=False, markup=False, soft_wrap=True)


def fail(message: str, code: int = MACHINE) -> NoReturn:
    """Say what is wrong and end; for the codes see serve.failures."""
    complain(message)
    raise typer.Exit(code)
