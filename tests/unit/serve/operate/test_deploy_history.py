"""Which deploy `dure rollback` goes back to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve.config.base import SettingsError
from serve.operate import deploy_history


class Store:
    """Ray's key-value store, as far as it is used."""

    def __init__(self) -> None:
        self.known: dict[tuple[bytes, bytes], bytes] = {}

    def _internal_kv_get(self, key: bytes, namespace: bytes) -> bytes | None:
        return self.known.get((namespace, key))

    def _internal_kv_put(self, key: bytes, value: bytes, overwrite: bool, namespace: bytes) -> None:
        self.known[namespace, key] = value


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Store()
    monkeypatch.setattr(deploy_history, "_store", lambda: kept)


def deploy(version: str, ready: bool = True) -> int:
    document: dict[str, Any] = {"version": version}
    number = deploy_history.record(f"{version}.yaml", document).number
    if ready:
        deploy_history.confirm(number)
    return number


def test_it_goes_back_to_the_last_that_came_up_and_is_another() -> None:
    deploy("a")
    good = deploy("b")
    deploy("c", ready=False)
    deploy("d", ready=False)
    assert deploy_history.earlier(None).number == good
    again = deploy("b")
    assert deploy_history.earlier(None).number == good - 1
    assert deploy_history.earlier(again).source == "b.yaml"


def test_where_nothing_came_up_before_there_is_nothing_to_go_back_to() -> None:
    with pytest.raises(SettingsError, match="known: none"):
        deploy_history.earlier(None)
    deploy("a", ready=False)
    deploy("b")
    deploy("b")
    with pytest.raises(SettingsError, match="that came up with another config; known: 1, 2, 3"):
        deploy_history.earlier(None)
    with pytest.raises(SettingsError, match="deploy 7"):
        deploy_history.earlier(7)
    assert deploy_history.earlier(1).source == "a.yaml"  # by its number, whatever became of it


def test_only_the_last_ones_are_kept() -> None:
    numbers = [deploy(str(number)) for number in range(deploy_history.KEPT + 3)]
    assert [each.number for each in deploy_history.deploys()] == numbers[3:]


def test_the_one_before_is_one_that_came_up() -> None:
    first = deploy("a")
    deploy("b", ready=False)
    last = deploy("b")
    before = deploy_history.came_up_before(last)
    assert before
    assert before.number == first
    assert deploy_history.came_up_before(first) is None


def test_what_a_later_version_keeps_of_a_deploy_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    number = deploy("a")
    [known] = json.loads(deploy_history._store().known[deploy_history.NAMESPACE, deploy_history.KEY])
    deploy_history._store()._internal_kv_put(
        deploy_history.KEY,
        json.dumps([known | {"later": True}]).encode(),
        overwrite=True,
        namespace=deploy_history.NAMESPACE,
    )
    assert [each.number for each in deploy_history.deploys()] == [number]
