from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from deployments.load_progress import LoadEvent, LoadProgress
from serve.board import actor as board_module
from serve.board.actor import Board
from serve.board.reports import CONSTRUCTOR_TRIES, Replica, Report
from serve.board.watch import Watch


def at(status: Any, progress: float = 50.0, replica: str = "r1", message: str = "") -> Replica:
    return Replica("m", replica, LoadEvent(status, progress, message, message))


def said(*states: Replica, step: int = 0) -> Report:
    return Report("m", states[0].replica, step=step, states={state.replica: state for state in states})


def test_a_late_listener_gets_all_there_is_and_then_only_changes() -> None:
    async def scenario() -> None:
        board = Board()
        await board.report(said(at("preparing", 15), step=0))
        await board.report(said(at("loading_checkpoint", 40), step=1))
        first = await board.listen("", 0)
        assert first.whole
        assert [replica.event.progress for _, replica in first.states if replica] == [40]
        waiting = asyncio.create_task(board.listen(first.epoch, first.sequence))
        await asyncio.sleep(0.01)
        await board.report(said(at("ready", 100), step=2))
        await board.report(said(at("ready", 100), step=2))
        changes = await waiting
        assert not changes.whole
        assert [replica.event.status for _, replica in changes.states if replica] == ["ready"]
        assert (await board.listen(first.epoch, first.sequence)).sequence == changes.sequence

    asyncio.run(scenario())


def test_a_board_that_follows_one_that_died_hears_all_before_it_tells_how_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(board_module, "LEARN_S", 0.3)

    async def scenario() -> None:
        board = Board()
        asked = asyncio.create_task(board.listen("of the one before", 7))
        await asyncio.sleep(0.01)
        await board.report(said(at("ready", 100)))
        changes = await asked
        assert changes.whole
        assert [replica.event.status for _, replica in changes.states if replica] == ["ready"]

    asyncio.run(scenario())


def test_a_report_that_arrives_late_is_not_believed() -> None:
    async def scenario() -> None:
        board = Board()
        await board.report(said(at("loading_checkpoint", 60), step=5))
        await board.report(said(at("loading_checkpoint", 40), step=4))
        assert board.replicas["m", "r1"].event.progress == 60

    asyncio.run(scenario())


def test_a_copy_is_gone_once_it_serves_in_whatever_order_reports_arrive() -> None:
    async def scenario() -> None:
        board = Board()
        await board.report(said(at("ready", 100), at("loading_checkpoint", 60, "r1/1"), step=1))
        assert set(board.replicas) == {("m", "r1"), ("m", "r1/1")}
        before = board.sequence
        await board.report(said(at("ready", 100), step=3))
        changes = await board.listen(board.epoch, before)
        assert [state and state.event.status for _, state in changes.states] == ["ready", None]
        await board.report(said(at("ready", 100), at("ready", 100, "r1/1"), step=2))
        assert set(board.replicas) == {("m", "r1")}

    asyncio.run(scenario())


def test_what_a_process_could_not_carry_out_is_heard_once() -> None:
    async def scenario() -> None:
        board = Board()
        await board.report(said(at("ready", 100)))
        order = await board.order("m", {"precision": "fp32"})
        refusal = replace(said(at("ready", 100), step=1), refused=(order, "no memory"))
        for _ in range(2):
            await board.report(refusal)
        latest, _ = await board.reload("m")
        assert latest
        assert (latest.state, latest.reason) == ("failed", "no memory")
        again = await board.order("m", {"precision": "fp32"})
        assert await board.report(refusal) == again

    asyncio.run(scenario())


def test_a_stop_is_heard_by_those_who_were_not_listening_just_then() -> None:
    async def scenario() -> None:
        board = Board()
        first = await board.listen("", 0)
        await board.stop()
        changes = await asyncio.wait_for(board.listen(first.epoch, first.sequence, first.stops), 1)
        assert changes.stops > first.stops

    asyncio.run(scenario())


def test_silent_replicas_are_gone_and_those_that_were_loading_have_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "BEAT_S", 0.01)
    monkeypatch.setattr(board_module, "SILENCE_S", 0.1)

    async def scenario() -> None:
        board = Board()
        await board.report(said(at("ready", 100, "served")))
        await board.report(said(at("loading_checkpoint", 40, "loading")))
        await asyncio.sleep(0.3)
        assert ("m", "served") not in board.replicas
        failed = board.replicas["m", "loading"].event
        assert failed.status == "failed"
        assert failed.progress == 40

    asyncio.run(scenario())


def test_a_ready_replica_forgives_those_that_failed_before() -> None:
    async def scenario() -> None:
        board = Board()
        await board.report(said(at("failed", 15, "first")))
        await board.report(said(at("ready", 100, "second")))
        assert set(board.replicas) == {("m", "second")}

    asyncio.run(scenario())


def test_a_model_has_failed_only_when_serve_gives_up() -> None:
    watch = Watch()
    assert watch.state("m") == "loading"
    for number in range(CONSTRUCTOR_TRIES):
        assert watch.state("m") == "loading"
        watch.replicas["m", f"r{number}"] = at("failed", 15, f"r{number}", message="Failed: no weights")
    assert watch.state("m") == "failed"
    assert watch.reason("m") == "no weights"
    watch.replicas["m", "another"] = at("preparing", 15, "another")
    assert watch.state("m") == "loading"
    watch.replicas["m", "another"] = at("ready", 100, "another")
    assert watch.state("m") == "ready"


def test_load_progress_never_goes_back() -> None:
    events: list[LoadEvent] = []
    progress = LoadProgress(events.append)
    progress.preparing()
    progress.tokenizer()
    for percent, shard in ((0, 0), (50, 2), (100, 4)):
        progress.checkpoint(percent, shard, 4)
    progress.checkpoint(10, 0, 4)  # a fallback reads the checkpoint once more
    progress.loaded()
    progress.ready()
    assert [event.progress for event in events] == [15, 25, 25, 55, 85, 85, 85, 100]
    assert events[3].message_ko == "체크포인트 로드 중 2/4... 50%"
    assert events[3].message == "Loading checkpoint 2/4... 50%"
    assert (events[-1].shard, events[-1].shards) == (0, 4)


def test_what_is_loaded_once_more_does_not_go_back_a_status() -> None:
    events: list[LoadEvent] = []
    progress = LoadProgress(events.append)
    progress.checkpoint(100, 1, 1)
    progress.measuring()
    progress.tokenizer()
    progress.checkpoint(50, 0, 1)
    progress.loaded()
    assert [event.status for event in events] == ["loading_checkpoint", "loaded", "loaded"]
