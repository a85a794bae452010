"""Waiting for events and for the end of tasks."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any


async def within(event: asyncio.Event, timeout_s: float | None) -> bool:
    """Wait until the event is set, or the time is up. Returns whether it is set."""
    # Not wait_for, which in Python 3.11 loses a cancellation that arrives just as the event is set.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
    return event.is_set()


async def end(*tasks: asyncio.Future[Any]) -> list[Any]:
    """Cancel tasks and wait until they have ended. Returns what each of them returned or raised."""
    for task in tasks:
        task.cancel()
    return await asyncio.gather(*tasks, return_exceptions=True)
