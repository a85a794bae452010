"""What has been deployed into a cluster, kept by the cluster itself, so that one can go back."""

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
    """The file, or the deploy that it went back to."""
    document: dict[str, Any]
    ready: bool = False
    """Its models came up."""
    code: str = ""
    """The version of Dure itself."""


def deploys() -> list[Deploy]:
    """Of this cluster, the last one last; needs a connection to Ray."""
    known = _store()._internal_kv_get(KEY, namespace=NAMESPACE)
    names = {field.name for field in fields(Deploy)}  # a later version may have kept more
    return [Deploy(**{name: each[name] for name in names & each.keys()}) for each in json.loads(known or "[]")]


def record(source: str, document: dict[str, Any], code: str = "") -> Deploy:
    """Note what is being deployed."""
    before = deploys()
    deploy = Deploy(before[-1].number + 1 if before else 1, time.time(), source, document, code=code)
    _keep([*before, deploy][-KEPT:])
    return deploy


def came_up_before(number: int) -> Deploy | None:
    """The last one that came up before the deploy with this number."""
    return next((each for each in reversed(deploys()) if each.ready and each.number < number), None)


def confirm(number: int) -> None:
    """The deploy with this number is ready."""
    _keep([replace(each, ready=each.ready or each.number == number) for each in deploys()])


def _keep(known: list[Deploy]) -> None:
    content = json.dumps([asdict(each) for each in known]).encode()
    _store()._internal_kv_put(KEY, content, overwrite=True, namespace=NAMESPACE)


def _store() -> Any:
    """Ray's own, as lasting as the cluster. Not imported above: Ray reads its environment when it is imported."""
    from ray.experimental import internal_kv

    return internal_kv


def earlier(number: int | None) -> Deploy:
    """The deploy with this number, or the last that was ready and differs from the last. Raises SettingsError."""
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
