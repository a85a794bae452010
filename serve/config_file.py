"""A config file: a Ray Serve config whose `args` are Dure's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from serve.settings import Settings
from serve.strict import SettingsError, unknown_name

SECRET = (".url", ".secret")
"""Settings that may hold a password: what they are is not repeated."""


class ConfigFile(BaseModel):
    """A config file: what `dure serve` itself needs of it, and the whole of it for Ray Serve."""

    path: Path
    host: str
    port: int
    settings: Settings
    document: dict[str, Any]

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://{host}:{self.port}"


def read_config(path: Path) -> ConfigFile:
    """Read and check a config file. Raises SettingsError with a line for each thing to change."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {error}") from error
    return checked(path, document)


def checked(path: Path, document: Any) -> ConfigFile:
    """The config file that `path` has, or had when it was deployed. Raises SettingsError."""
    from ray.serve.schema import ServeDeploySchema

    if not isinstance(document, dict) or not document.get("applications"):
        raise SettingsError(f"{path}: a config file has `applications`, a list of one; see configs/local.yaml")
    try:
        ServeDeploySchema.model_validate(document)
        settings = Settings.model_validate(document["applications"][0].get("args") or {})
    except ValidationError as error:
        at = "applications.0.args" if error.title == "Settings" else ""
        raise SettingsError("\n".join(f"{path}: {line}" for line in explain(error, at))) from error
    http = document.get("http_options") or {}
    return ConfigFile(
        path=path,
        host=http.get("host") or "127.0.0.1",
        port=http.get("port") or 8000,
        settings=settings,
        document=document,
    )


def explain(error: ValidationError, at: str = "") -> list[str]:
    """A line per problem: the path, what is wrong, the value, and the nearest value that would do."""
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in ([at] if at else []) + list(problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        value = problem.get("input")
        if problem["type"] == "literal_error":
            known = [word.strip(" '") for word in problem["ctx"]["expected"].replace(" or ", ",").split(",")]
            message = unknown_name(str(value), "value", known)
        elif path.endswith(SECRET):
            pass
        elif isinstance(value, str | int | float | bool | None) and problem["type"] != "missing":
            message += f" (it is {value!r})"
        lines.append(f"{path}: {message}")
    return lines
