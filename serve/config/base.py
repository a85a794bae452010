"""The base of all settings. Unknown keys are refused, and errors say what to change."""

import difflib
from collections.abc import Callable
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, model_validator


class SettingsError(Exception):
    """A config file, or something it names, is invalid. The message has one line for each thing to change."""


class Strict(BaseModel):
    """Refuses unknown keys, naming the nearest known one, and values of the wrong type.

    Wrong are, for example, a number in quotes, `yes` for a number, and a number that is not finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = [key for key in data if key not in cls.model_fields]
            if unknown:
                raise ValueError("; ".join(unknown_name(str(key), "key", list(cls.model_fields)) for key in unknown))
        return data


def unknown_name(name: str, kind: str, known: list[str]) -> str:
    """Message for an unknown `name`, with the nearest known name or else all of them."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
    return f"unknown {kind} {name!r}; {hint}"


def refused(why: str) -> Callable[[object], NoReturn]:
    """A validator for a key that is known but refused with any value."""

    def refuse(value: object) -> NoReturn:
        raise ValueError(why)

    return refuse


def always(value: str, why: str) -> Callable[[str], str]:
    """A validator for a key that accepts only one value."""

    def check(given: str) -> str:
        if given != value:
            raise ValueError(f"write {value}: {why}")
        return given

    return check
