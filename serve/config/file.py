"""A config file: a Ray Serve config whose `args` are Dure's settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from serve.config.base import SettingsError, unknown_name
from serve.config.serve_options import FileOptions
from serve.config.settings import Settings
from serve.config.yaml_file import read_yaml
from serve.errors import problem_text
from serve.failures import one_line, printable

SECRET = (".url", ".secret", "password")
"""Endings of the paths of settings that may hold a password. Their values are not repeated."""
LONGEST = 60
"""Most characters of a value that are repeated."""
TYPES = {
    "missing": "is missing",
    "model_type": "has to be a mapping, `key: value`",
    "dict_type": "has to be a mapping, `key: value`",
    "list_type": "has to be a list",
    "string_type": "has to be text; put it in quotes",
    "int_type": "has to be a whole number",
    "float_type": "has to be a number",
    "finite_number": "has to be a finite number",
    "bool_type": "has to be true or false",
}


@dataclass(frozen=True)
class ConfigFile:
    """A config file: the parts that `dure serve` needs, and the whole document for Ray Serve."""

    path: Path
    host: str
    port: int
    settings: Settings
    document: dict[str, Any]

    @property
    def url(self) -> str:
        """URL of Dure on this machine."""
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host
        return f"http://{host}:{self.port}"


def read_config(path: Path) -> ConfigFile:
    """Read and check a config file. Raises SettingsError with a line for each thing to change."""
    return checked(path, read_yaml(path))


def checked(path: Path, document: object) -> ConfigFile:
    """The config file with this document, which `path` holds or held when it was deployed. Raises SettingsError."""
    from ray.serve.schema import ServeDeploySchema

    if not isinstance(document, dict) or not document.get("applications"):
        raise SettingsError(f"{path}: a config file needs `applications`, a list of one; see configs/local.yaml")
    try:
        options = FileOptions.model_validate(document)
        ServeDeploySchema.model_validate(document)  # checks logging_config and runtime_env
    except ValidationError as error:
        raise SettingsError("\n".join(f"{path}: {line}" for line in explain(error))) from error
    http = options.http_options
    return ConfigFile(path, http.host, http.port, options.applications[0].args, document)


def explain(error: ValidationError) -> Iterator[str]:
    """One line per problem: the path, what is wrong, the value, and the nearest valid value."""
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        message = one_line(_what(problem) + ("" if path.endswith(SECRET) else _shown(problem)))
        yield f"{printable(path)}: {message}" if path else message


def _what(problem: ErrorDetails) -> str:
    if problem["type"] == "literal_error":
        known = [word.strip(" '") for word in problem["ctx"]["expected"].replace(" or ", ",").split(",")]
        return unknown_name(str(problem["input"])[:LONGEST], "value", known)
    message = problem_text(problem).replace("Input should be", "has to be", 1)
    return TYPES.get(problem["type"], message)


def _shown(problem: ErrorDetails) -> str:
    value = problem["input"]
    if problem["type"] in ("missing", "literal_error") or not isinstance(value, str | int | float | bool | None):
        return ""
    if value is None or isinstance(value, bool):
        text = {None: "empty", True: "true", False: "false"}[value]
    else:
        text = repr(value)
    return f" (it is {text if len(text) <= LONGEST else text[:LONGEST] + '...'})"
