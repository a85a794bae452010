"""Answers as they come to be: plain ones, or events of how far a request is for who asks for `text/event-stream`."""

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
"""Makes an answer; tells meanwhile how far it is."""


async def respond(caller: Caller, work: Work) -> Response:
    """What `work` answers, or a stream of `queued` and `running`, and `result` or `error`. Raises DureError.

    What is refused before anything has happened is refused plainly. A server that stops lets both end, as each has a
    deadline.
    """
    if not caller.follows:
        return answer(await work(None))
    progress = followed(work)
    try:
        first = await anext(progress)
    except BaseException:
        await progress.aclose()
        raise
    return sse.response(_events(first, progress))


async def _events(first: Any, progress: AsyncGenerator[Any]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(sse.with_pauses(_chained(first, progress))) as items:
        try:
            async for each in items:
                if each is None:
                    yield sse.HEARTBEAT
                elif isinstance(each, Progress):
                    yield sse.event(each.told(), each.state)
                else:
                    yield sse.event(each, "result")
                    return
        except DureError as error:
            yield _failed(error)
        except Exception:  # the client gets no traceback; the log does
            logger.exception("a followed request failed")
            yield _failed(errors.internal())


def _failed(error: DureError) -> bytes:
    told = errors.body(error.kind, error.message, error.param) | {"status": error.status}
    return sse.event(told | dict(error.headers), "error")


async def _chained(first: Any, progress: AsyncGenerator[Any]) -> AsyncIterator[Any]:
    async with contextlib.aclosing(progress):
        yield first
        async for each in progress:
            yield each
