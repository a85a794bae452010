"""Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar

import orjson
from fastapi.responses import StreamingResponse

from serve.waiting import end

Item = TypeVar("Item")

HEARTBEAT_S = 10.0
HEARTBEAT = b": heartbeat\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(data: Any, name: str = "", id: str = "") -> bytes:
    lines = [b"event: " + name.encode()] if name else []
    lines += [b"id: " + id.encode()] if id else []
    return b"\n".join([*lines, b"data: " + orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY)]) + b"\n\n"


def response(events: AsyncIterator[bytes]) -> StreamingResponse:
    return StreamingResponse(events, 200, HEADERS, "text/event-stream")


async def with_pauses(items: AsyncIterator[Item], stopping: asyncio.Event | None = None) -> AsyncGenerator[Item | None]:
    """The items, with None whenever none arrived for HEARTBEAT_S.

    Endless iterators need `stopping`, an event set when the server is about to stop, which ends them.
    """
    stop = asyncio.ensure_future((stopping or asyncio.Event()).wait())
    upcoming: asyncio.Future[Item] = asyncio.ensure_future(anext(items))
    try:
        while True:
            await asyncio.wait((stop, upcoming), timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                return
            if not upcoming.done():
                yield None
                continue
            try:
                item = upcoming.result()
            except StopAsyncIteration:
                return
            upcoming = asyncio.ensure_future(anext(items))
            yield item
    finally:
        await end(stop, upcoming)


async def chained(first: Item, rest: AsyncIterator[Item]) -> AsyncIterator[Item]:
    """`first`, then the rest."""
    yield first
    async for item in rest:
        yield item
