from __future__ import annotations

import pickle

import pytest

from serve import errors
from serve.calls import Gate
from serve.errors import DureError


def test_a_full_queue_refuses_with_the_time_to_come_back() -> None:
    gate = Gate("m", 4)
    gate.seconds_per_item = 2.0
    with gate.admitted(3), gate.admitted(1), pytest.raises(DureError) as caught, gate.admitted(1):
        pass
    assert caught.value.status == 429
    assert caught.value.headers == {"Retry-After": "8"}
    with gate.admitted(4):
        pass
    assert gate.items == 0


def test_a_list_longer_than_the_queue_gets_in_when_it_is_empty() -> None:
    gate = Gate("m", 4)
    with gate.admitted(100):
        assert gate.items == 100
        with pytest.raises(DureError), gate.admitted(1):
            pass


def test_a_failed_call_gives_its_place_back() -> None:
    gate = Gate("m", 1)
    for _ in range(3):
        with pytest.raises(RuntimeError), gate.admitted(1):
            raise RuntimeError
    assert gate.items == 0


def test_retry_after_is_whole_seconds_and_at_least_one() -> None:
    assert errors.queue_full("m", 3, 0.01).headers == {"Retry-After": "1"}
    assert errors.queue_full("m", 3, 7.2).headers == {"Retry-After": "8"}
    assert errors.invalid("no").headers == {}


def test_errors_survive_the_way_between_processes() -> None:
    error = errors.queue_full("m", 3, 7.2)
    again = pickle.loads(pickle.dumps(error))
    assert (again.status, again.kind, str(again), again.headers) == (429, "queue_full", str(error), error.headers)
