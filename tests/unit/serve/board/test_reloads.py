from __future__ import annotations

import pytest

from serve.board.reloads import Reloads

BOTH = {"a", "b"}
FP32 = {"precision": "fp32"}


def test_replicas_reload_one_after_the_other() -> None:
    reloads = Reloads()
    order = reloads.order("d", FP32)
    assert reloads.ready("a", None, BOTH) == order
    assert reloads.ready("b", None, BOTH) is None, "it is not its turn"
    assert reloads.ready("a", None, BOTH) == order, "told again until it is done"
    assert reloads.ready("a", order, BOTH) is None
    assert reloads.ready("b", None, BOTH) == order
    assert reloads.latest
    assert reloads.latest.state == "running"
    reloads.ready("b", order, BOTH)
    assert reloads.latest.state == "done"
    assert reloads.started("d") == order, "for replicas that start later"


def test_only_one_order_at_a_time() -> None:
    reloads = Reloads()
    reloads.order("d", FP32)
    with pytest.raises(ValueError, match="under way"):
        reloads.order("d", FP32)


def test_what_cannot_be_carried_out_changes_nothing() -> None:
    reloads = Reloads()
    first = reloads.order("d", FP32)
    reloads.ready("a", first, {"a"})
    bad = reloads.order("d", {"source": "nowhere"})
    assert reloads.ready("a", first, {"a"}) == bad
    reloads.refused(bad, "there is no folder nowhere")
    assert reloads.latest
    assert (reloads.latest.state, reloads.latest.reason) == ("failed", "there is no folder nowhere")
    assert reloads.ready("a", first, {"a"}) is None
    assert reloads.started("d") == first
    assert reloads.order("d", {"precision": "bf16"}).number > bad.number


def test_an_order_that_the_second_replica_cannot_carry_out_is_taken_back_from_the_first() -> None:
    reloads = Reloads()
    order = reloads.order("d", FP32)
    reloads.ready("a", order, BOTH)
    assert reloads.ready("b", None, BOTH) == order
    reloads.refused(order, "no memory")
    back = reloads.ready("a", order, BOTH)
    assert back is not None
    assert back.changes == {}
    reloads.ready("a", back, BOTH)
    assert reloads.ready("b", None, BOTH) == back
    reloads.ready("b", back, BOTH)
    assert reloads.latest
    assert (reloads.latest.state, reloads.latest.reason) == ("failed", "no memory")


def test_a_replica_that_dies_in_its_turn_gives_it_up() -> None:
    reloads = Reloads()
    order = reloads.order("d", FP32)
    assert reloads.ready("a", None, BOTH) == order
    assert reloads.ready("b", None, {"b"}) == order


def test_a_board_that_starts_anew_gives_no_number_twice() -> None:
    refused = Reloads().order("d", FP32)
    assert Reloads().order("d", {"precision": "bf16"}, begun=refused.number).number > refused.number


def test_the_next_deploy_ends_it() -> None:
    reloads = Reloads()
    order = reloads.order("d", FP32)
    reloads.ready("a", order, {"a"})
    assert reloads.started("d") == order
    assert reloads.started("e") is None
    assert reloads.ready("c", None, {"c"}) is None


def test_a_board_that_starts_anew_learns_what_stands() -> None:
    order = Reloads().order("d", FP32)
    reloads = Reloads()
    assert reloads.ready("a", order, BOTH) is None
    assert reloads.started("d") == order
    assert reloads.order("d", {"precision": "bf16"}).number > order.number
