"""Requests become items only as long as somebody waits for them."""

from __future__ import annotations

import threading
from typing import Any

from deployments.batching.waiting import LATE, TAKEN_BACK
from deployments.loaded_model import Preparation
from deployments.messages import Refusal, Requests
from deployments.spec import ItemError


def requests(count: int, timeout_s: float = 10) -> Requests:
    return Requests([f"text {number}" for number in range(count)], [timeout_s] * count, list(range(100, 100 + count)))


def test_what_is_taken_back_meanwhile_is_not_prepared() -> None:
    preparation = Preparation(requests(5), 0.0)
    preparation.since = 1e12
    prepared: list[Any] = []

    def prepare(request: str) -> str:
        prepared.append(request)
        preparation.unwanted.update({102, 104})
        return request.upper()

    assert preparation.run(prepare) == ["TEXT 0", "TEXT 1", TAKEN_BACK, "TEXT 3", TAKEN_BACK]
    assert prepared == ["text 0", "text 1", "text 3"]


def test_nothing_more_is_prepared_once_the_caller_has_gone() -> None:
    preparation = Preparation(requests(3), 1e12)
    begun, left = threading.Event(), threading.Event()

    def prepare(request: str) -> str:
        begun.set()
        left.wait(10)
        return request

    found: list[Any] = []
    worker = threading.Thread(target=lambda: found.extend(preparation.run(prepare)))
    worker.start()
    begun.wait(10)
    preparation.gone = True
    left.set()
    worker.join(10)
    assert found == ["text 0", TAKEN_BACK, TAKEN_BACK]


def test_what_is_too_late_is_not_prepared_and_what_cannot_be_is_refused_alone() -> None:
    assert Preparation(requests(2, 0.001), 0.0).run(str) == [LATE, LATE]

    def prepare(request: str) -> str:
        if request == "text 1":
            raise ItemError("no such text", "input")
        if request == "text 2":
            raise KeyError(request)
        return request

    first, bad, failed, last = Preparation(requests(4), 1e12).run(prepare)
    assert (first, last) == ("text 0", "text 3")
    assert bad == Refusal("no such text", "invalid", "input")
    assert failed.kind == "failed"
