"""Answers as a client that follows them reads them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi.responses import StreamingResponse

from serve import errors
from serve.board.watch import Watch
from serve.caller import Caller
from serve.http import sse
from serve.http.respond import respond
from serve.progress import Following
from serve.routes.loading import _stream

WORK_S = 0.1


async def work(following: Following | None) -> Any:
    assert following
    following.running()
    await asyncio.sleep(WORK_S)
    return {"answer": 1}


async def refused(following: Following | None) -> Any:
    await work(following)
    raise errors.too_late("shout", 2)


def heard(work: Any) -> list[bytes]:
    async def scenario() -> list[bytes]:
        response = await respond(Caller(5, time.monotonic() + 5, follows=True), work)
        assert isinstance(response, StreamingResponse)
        return [bytes(each) async for each in response.body_iterator]

    return asyncio.run(scenario())


def test_while_there_is_no_news_a_heartbeat_keeps_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sse.HEARTBEAT_S == 10
    monkeypatch.setattr(sse, "HEARTBEAT_S", WORK_S / 5)
    first, *pauses, last = heard(work)
    assert first == b"event: running\ndata: {}\n\n"
    assert 2 <= len(pauses) <= 5
    assert set(pauses) == {sse.HEARTBEAT}
    assert last == b'event: result\ndata: {"answer":1}\n\n'


def test_what_fails_while_it_is_followed_ends_with_an_error() -> None:
    assert heard(refused)[-1].startswith(b'event: error\ndata: {"error":{"type":"deadline_exceeded"')


def test_a_stream_without_end_ends_where_the_server_stops() -> None:
    async def scenario() -> None:
        stopping = asyncio.Event()

        async def endless() -> AsyncIterator[int]:
            yield 1
            await asyncio.sleep(60)

        items = sse.with_pauses(endless(), stopping)
        assert await anext(items) == 1
        stopping.set()
        assert [item async for item in items] == []

    asyncio.run(scenario())


def test_a_stream_of_progress_ends_where_the_server_stops() -> None:
    async def scenario() -> None:
        watch = Watch()
        stream = _stream(watch, [], follow=True)
        first = asyncio.ensure_future(anext(stream, b"over"))
        await asyncio.sleep(0.01)
        assert not first.done()
        watch.stopping.set()
        assert await first == b"over"

    asyncio.run(scenario())
