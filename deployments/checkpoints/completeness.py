"""Checks that all of a model's weights come from its checkpoint.

transformers fills missing weights with random numbers and ignores weights that the model does not have. Both are errors
here, with two exceptions: weights that do not affect the model's output (such as a pooler that another pooling
replaces), and weights of another head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import modeling_utils

from deployments.spec import CheckpointError

Probe = Callable[[Any], torch.Tensor]
"""Returns the output of a loaded model for an example."""

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""Number of a layer, as part of a weight's name."""
SHOWN = 5
"""Most names of weights in one message."""


@dataclass(frozen=True)
class LoadReport:
    """What transformers reported while loading one model."""

    model: nn.Module
    missing: set[str]
    unexpected: set[str]
    mismatched: list[tuple[str, list[int], list[int]]]
    """Name, shape in the checkpoint, shape in the model."""


@contextmanager
def reports() -> Iterator[list[LoadReport]]:
    """Collect a report for each model that transformers loads in the body, instead of the tables that it would log."""
    found: list[LoadReport] = []

    def take(model: nn.Module, loading_info: Any, **_: Any) -> None:
        failures = [*loading_info.error_msgs, *loading_info.conversion_errors.values()]
        if failures:
            raise CheckpointError(f"{type(model).__name__} can't load its weights: {failures[0].strip()}")
        mismatched = [(name, list(there), list(here)) for name, there, here in loading_info.mismatched_keys]
        found.append(LoadReport(model, set(loading_info.missing_keys), set(loading_info.unexpected_keys), mismatched))

    usual = modeling_utils.log_state_dict_report
    modeling_utils.log_state_dict_report = take
    try:
        yield found
    finally:
        modeling_utils.log_state_dict_report = usual


def require(model: Any, found: Iterable[LoadReport], folder: Path, probe: Probe | None) -> None:
    """Raises CheckpointError naming weights that are missing, misshapen or unknown to the model."""
    missing: list[tuple[LoadReport, str]] = []
    for report in found:
        name = type(report.model).__name__
        if report.mismatched:
            shapes = [f"{weight} {there} instead of {here}" for weight, there, here in sorted(report.mismatched)]
            raise CheckpointError(f"the checkpoint in {folder} does not fit its config ({name}): {_listed(shapes)}")
        beyond = _layers_beyond(report)
        if beyond:
            raise CheckpointError(
                f"the checkpoint in {folder} has more layers than its config.json says: {_listed(beyond)}"
            )
        missing += [(report, weight) for weight in sorted(report.missing)]
    if missing and (probe is None or _matter(missing, model, probe)):
        report = missing[0][0]
        names = [weight for _, weight in missing]
        raise CheckpointError(
            f"the checkpoint in {folder} lacks weights that {type(report.model).__name__} needs: {_listed(names)}"
            + _hint(report)
        )


def _matter(missing: list[tuple[LoadReport, str]], model: Any, probe: Probe) -> bool:
    """Whether the output depends on any missing weight. All are set to NaN to find out, and to zero in the end."""
    tensors = [_tensor(report.model, name) for report, name in missing]
    if not all(tensor.is_floating_point() for tensor in tensors):
        return True
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(torch.nan)
        matter = not bool(torch.isfinite(probe(model)).all())
        for tensor in tensors:
            tensor.zero_()
    return matter


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return model.get_buffer(name)


def _layers_beyond(report: LoadReport) -> list[str]:
    """Unexpected weights whose names differ from the model's only in the number of the layer."""
    own = {ending for name in report.model.state_dict() for ending in _endings(name)}
    alike = {_without_number(ending) for ending in own}
    return sorted(
        name
        for name in report.unexpected
        if not any(ending in own for ending in _endings(name))
        and any("#" in ending and ending in alike for ending in map(_without_number, _endings(name)))
    )


def _endings(name: str) -> Iterator[str]:
    """A weight's name with 0, 1, 2, ... of its prefixes removed, for as long as it includes a layer's number."""
    while re.search(NUMBER, name):
        yield name
        name = name.partition(".")[2]


def _without_number(name: str) -> str:
    return re.sub(NUMBER, "#", name)


def _hint(report: LoadReport) -> str:
    """A hint about what the checkpoint has instead of the missing weights."""
    prefixes = {
        name.removesuffix(missing)
        for missing in report.missing
        for name in report.unexpected
        if name.endswith(f".{missing}")
    }
    if prefixes:
        return f"; there they begin with {min(prefixes)!r}: save them without it"
    config = getattr(report.model, "config", None)
    made = ", ".join(getattr(config, "architectures", None) or [])
    if made and made != type(report.model).__name__:
        return f"; it was saved as {made}"
    if report.unexpected:
        return f"; it has {_listed(sorted(report.unexpected))}, which belong to another model"
    return ""


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
