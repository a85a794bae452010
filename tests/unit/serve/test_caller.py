"""What a request's headers say of who asks and how long they wait."""

from __future__ import annotations

import pickle
import time

import pytest

from serve.caller import Caller
from serve.errors import DureError


def of(longest_s: float = 120, **headers: str) -> Caller:
    return Caller.of([(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()], longest_s)


def test_one_who_says_nothing_waits_as_long_as_the_config_says() -> None:
    caller = of(30)
    assert (caller.timeout_s, caller.tenant, caller.ticket, caller.follows) == (30, "default", None, False)
    assert 29 < caller.left_s() <= 30


def test_a_timeout_may_be_shorter_and_not_longer() -> None:
    assert of(x_request_timeout="2.5").timeout_s == 2.5
    assert of(10, x_request_timeout="600").timeout_s == 10
    several = [(b"x-request-timeout", value) for value in (b"3", b"2", b"4")]
    assert Caller.of(several, 120).timeout_s == 2


def test_what_is_over_has_a_little_left() -> None:
    caller = of(x_request_timeout="0.001")
    time.sleep(0.01)
    assert 0 < caller.left_s() < 0.01


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf", "1e999", "٣s", "1_0"])
def test_a_timeout_is_seconds(value: str) -> None:
    with pytest.raises(DureError) as caught:
        of(x_request_timeout=value)
    assert (caught.value.status, caught.value.param) == (400, "X-Request-Timeout")


@pytest.mark.parametrize("value", ["", "-a", "a b", "é", "x" * 65, "a/b", "a\n"])
def test_a_tenant_has_a_plain_name(value: str) -> None:
    with pytest.raises(DureError) as caught:
        of(x_tenant_id=value)
    assert (caught.value.status, caught.value.param) == (400, "X-Tenant-ID")


def test_events_are_asked_for_by_accept() -> None:
    assert of(accept="text/event-stream").follows
    assert of(accept="application/json, text/event-stream;q=0.9").follows
    assert of(accept="Text/Event-Stream").follows
    assert not of(accept="*/*").follows


def test_an_empty_ticket_is_none() -> None:
    assert of(x_dure_ticket="").ticket is None
    assert of(x_dure_ticket="abc").ticket == "abc"


def test_another_process_gets_the_time_that_is_left_and_no_ticket() -> None:
    """`time.monotonic` of another machine starts elsewhere, so a deadline means nothing there."""
    caller = Caller.waiting(20, "t", "ticket")
    sent = pickle.dumps(caller)
    time.sleep(0.05)
    arrived = pickle.loads(sent)
    assert (arrived.timeout_s, arrived.tenant, arrived.ticket) == (20, "t", None)
    assert 0.04 < arrived.deadline - caller.deadline < 5
