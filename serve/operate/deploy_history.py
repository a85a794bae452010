"""The deploys of a cluster, kept by the cluster itself so that a deploy can be rolled back."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from serve.config.base import SettingsError

KEY, NAMESPACE = b"deploys", b"dure"
KEPT = 10


@dataclass(frozen=True)
class Deploy:
    number: int
    at: float
    """Unix time."""
    source: str
    """The config file; for a rollback, that of the deploy it goes back to."""
    document: dict[str, Any]
    ready: bool = False
    """Whether its models came up."""
    code: str = ""
    """Version of Dure's own code."""


def deploys() -> list[Deploy]:
    """The deploys of this cluster, oldest first. Needs a connection to Ray."""
    known = _store()._internal_kv_get(KEY, namespace=NAMESPACE)
    names = {field.name for field in fields(Deploy)}  # a newer version may have stored more fields
    return [Deploy(**{name: each[name] for name in names & each.keys()}) for each in json.loads(known or "[]")]


def record(source: str, document: dict[str, Any], code: str = "") -> Deploy:
    """Record a deploy that begins."""
    before = deploys()
    deploy = Deploy(before[-1].number + 1 if before else 1, time.time(), source, document, code=code)
    _keep([*before, deploy][-KEPT:])
    return deploy


def came_up_before(number: int) -> Deploy | None:
    """The last deploy before this number whose models came up."""
    return next((each for each in reversed(deploys()) if each.ready and each.number < number), None)


def confirm(number: int) -> None:
    """Mark the deploy with this number as ready."""
    _keep([replace(each, ready=each.ready or each.number == number) for each in deploys()])


def _keep(known: list[Deploy]) -> None:
    content = json.dumps([asdict(each) for each in known]).encode()
    _store()._internal_kv_put(KEY, content, overwrite=True, namespace=NAMESPACE)


def _store() -> Any:
    """Ray's key-value store, which lasts as long as the cluster.

    Imported late, because Ray reads its environment when it is imported.
    """
    from ray.experimental import internal_kv

    return internal_kv


def earlier(number: int | None) -> Deploy:
    """The deploy with this number; without one, the last that came up with another config than the latest deploy.

    Raises SettingsError.
    """
    known = deploys()
    if number is not None:
        found = next((each for each in known if each.number == number), None)
    else:
        others = (each for each in reversed(known) if each.document != known[-1].document)
        found = next((each for each in others if each.ready), None)
    if found is None:
        have = ", ".join(str(each.number) for each in known) or "none"
        wanted = "earlier deploy that came up with another config" if number is None else f"deploy {number}"
        raise SettingsError(f"there is no {wanted}; known: {have}")
    return found
