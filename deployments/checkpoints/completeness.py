"""Are all of a model's weights those of its checkpoint?

transformers fills in at random what a checkpoint lacks and leaves out what the model has no place for. Both are errors
here, with two exceptions: weights that the model's output does not depend on (a pooler whose place another pooling
takes), and weights of another head.
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
"""The output of a loaded model for some example."""

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""Of a layer, as a part of a weight's name."""
SHOWN = 5
"""Names of weights in one message."""


@dataclass(frozen=True)
class LoadReport:
    """What transformers found out while it loaded one model."""

    model: nn.Module
    missing: set[str]
    unexpected: set[str]
    mismatched: list[tuple[str, list[int], list[int]]]
    """Name, shape in the checkpoint, shape in the model."""


@contextmanager
def reports() -> Iterator[list[LoadReport]]:
    """Of the models that transformers loads in the body; in the place of the tables that it would log."""
    found: list[LoadReport] = []

    def take(model: nn.Module, loading_info: Any, **_: Any) -> None:
        failures = [*loading_info.error_msgs, *loading_info.conversion_errors.values()]
        if failures:
            raise CheckpointError(f"{type(model).__name__} can't take its weights: {failures[0].strip()}")
        mismatched = [(name, list(there), list(here)) for name, there, here in loading_info.mismatched_keys]
        found.append(LoadReport(model, set(loading_info.missing_keys), set(loading_info.unexpected_keys), mismatched))

    usual = modeling_utils.log_state_dict_report
    modeling_utils.log_state_dict_report = take
    try:
        yield found
    finally:
        modeling_utils.log_state_dict_report = usual


def require(model: Any, found: Iterable[LoadReport], folder: Path, probe: Probe | None) -> None:
    """Raises CheckpointError naming weights that are missing, misshapen or have no place in the model."""
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
    """Does the output depend on any of them? They are made NaN to see; those that don't matter end as zeros."""
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
    """Weights without a place that are named as the model's are, but for the number of their layer."""
    own = {ending for name in report.model.state_dict() for ending in _endings(name)}
    alike = {_without_number(ending) for ending in own}
    return sorted(
        name
        for name in report.unexpected
        if not any(ending in own for ending in _endings(name))
        and any("#" in ending and ending in alike for ending in map(_without_number, _endings(name)))
    )


def _endings(name: str) -> Iterator[str]:
    """A weight's name without none, one or more of the prefixes that a model around it gives it, down to its layer."""
    while re.search(NUMBER, name):
        yield name
        name = name.partition(".")[2]


def _without_number(name: str) -> str:
    return re.sub(NUMBER, "#", name)


def _hint(report: LoadReport) -> str:
    """What the checkpoint has instead of the weights that it lacks."""
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
