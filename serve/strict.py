"""What all settings have in common: unknown keys are refused, and what is wrong says what to change."""

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class SettingsError(Exception):
    """A config file that can't be served: one line for each thing to change."""


class Strict(BaseModel):
    """Refuses unknown keys, naming the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = [key for key in data if key not in cls.model_fields]
            if unknown:
                raise ValueError("; ".join(unknown_name(str(key), "key", list(cls.model_fields)) for key in unknown))
        return data


def unknown_name(name: str, kind: str, known: list[str]) -> str:
    """Says that `name` is not known, and which name was meant or which there are."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
    return f"unknown {kind} {name!r}; {hint}"
