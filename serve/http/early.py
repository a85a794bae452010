"""Refusals that need only a request's head. They cost an overloaded server the least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from serve.caller import Caller
from serve.calls.deployment import Deployment
from serve.calls.graph import Graph
from serve.errors import DureError
from serve.metrics import measured

Run = TypeVar("Run", bound=Callable[..., object])


@dataclass(frozen=True)
class Calls:
    """What an endpoint calls, as far as known without the body. Exactly one of `task`, `model` and `service` is set."""

    task: str = ""
    """It calls one of the models with this task."""
    model: str = ""
    """Name of the path parameter that holds the model's name."""
    service: str = ""
    queued: bool = True
    """Whether the head names the tenant. False where the body does, so a full queue can't be checked early."""
    cached: bool = False
    """Whether answers may come from the cache, bypassing guard and queue."""


def calls(
    task: str = "", model: str = "", service: str = "", queued: bool = True, cached: bool = False
) -> Callable[[Run], Run]:
    """Declares what an endpoint calls, so that requests can be refused early; see Calls."""

    def declare(run: Run) -> Run:
        run.calls = Calls(task, model, service, queued, cached)  # type: ignore[attr-defined]
        return run

    return declare


def refuse_early(graph: Graph, calls: Calls, parts: Mapping[str, str], caller: Caller) -> None:
    """Raises DureError if the guard or a full queue would refuse the request whatever its body says."""
    if calls.cached and graph.predictions.cache is not None:
        return
    called = _called(graph, calls, parts)
    if not called:
        return
    try:
        if calls.service:
            _check_service(graph, calls, called[0], caller)
        else:
            _check_models(called, caller)
            _check_lanes(graph, called, caller)
    except DureError:
        with measured(called[0].name):
            raise


def _called(graph: Graph, calls: Calls, parts: Mapping[str, str]) -> Sequence[Deployment]:
    if calls.task:
        return [model for model in graph.models.values() if model.task == calls.task]
    found = graph.models.get(parts[calls.model]) if calls.model else graph.services.get(calls.service)
    return [found] if found else []


def _check_service(graph: Graph, calls: Calls, service: Deployment, caller: Caller) -> None:
    service.gate.check()
    if calls.queued and graph.lanes.full(service.name, caller):
        raise graph.lanes.turn_away(service.name, caller).error(service.name)


def _check_lanes(graph: Graph, models: Sequence[Deployment], caller: Caller) -> None:
    """Raises DureError if the lanes of all models are full."""
    if all(model.name in graph.lanes.limits and graph.lanes.full(model.name, caller) for model in models):
        raise graph.lanes.turn_away(models[0].name, caller).error(models[0].name)


def _check_models(models: Sequence[Deployment], caller: Caller) -> None:
    """Raises DureError only if all models refuse, as the body may name any of them.

    With several models no ticket is given, because a ticket is good for one queue only.
    """
    if len(models) == 1:
        models[0].gate.check_newcomer(caller)
    elif all(model.gate.overload() or model.gate.full(caller) for model in models):
        models[0].gate.check()
        raise models[0].gate.turned_away(caller)
