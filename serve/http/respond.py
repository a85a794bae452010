"""Responses: plain JSON, or progress events for clients that ask for `text/event-stream`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Response

from serve import errors
from serve.caller import Caller
from serve.errors import DureError
from serve.http import sse
from serve.http.requests import answer
from serve.progress import Following, Progress, followed

logger = logging.getLogger("ray.serve")

Work = Callable[[Following | None], Awaitable[Any]]
"""Computes an answer, and reports its progress meanwhile if somebody follows."""


async def respond(caller: Caller, work: Work) -> Response:
    """The answer of `work`, or a stream of `queued` and `running` events, then `result` or `error`. Raises DureError.

    A request that is refused before its first event gets a plain error response. Streams need not end early when the
    server stops, because each has a deadline.
    """
    if not caller.follows:
        return answer(await work(None))
    updates = followed(work)
    try:
        first = await anext(updates)
    except BaseException:
        await updates.aclose()
        raise
    return sse.response(_events(first, updates))


async def _events(first: Any, updates: AsyncGenerator[Any]) -> AsyncIterator[bytes]:
    paused = sse.with_pauses(sse.chained(first, updates))
    async with contextlib.aclosing(updates), contextlib.aclosing(paused) as all_updates:
        try:
            async for update in all_updates:
                if update is None:
                    yield sse.HEARTBEAT
                elif isinstance(update, Progress):
                    yield sse.event(update.fields(), update.state)
                else:
                    yield sse.event(update, "result")
                    return
        except DureError as error:
            yield _failed(error)
        except Exception:  # the client gets no traceback; the log does
            logger.exception("a followed request failed")
            yield _failed(errors.internal())


def _failed(error: DureError) -> bytes:
    data = errors.body(error.kind, error.message, error.param) | {"status": error.status}
    return sse.event(data | dict(error.headers), "error")
