"""Progress of a job as server-sent events: the states of its variants, and the events of finished stages."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse

from serve import errors
from serve.errors import DureError
from serve.http import sse
from serve.http.requests import GraphDep
from serve.routes.adverts.jobs import Service, TenantId
from serve.services.adverts.views import Progress

router = APIRouter(prefix="/api/yh", tags=["adverts"])

FIRST_S = 30.0
"""Time limit for the first state."""
LONGEST_S = 3600.0
"""The stream ends after this long. Clients reconnect, as an EventSource does by itself."""


@router.get("/jobs/{job_id}/events", response_class=StreamingResponse)
async def follow_job(
    job_id: uuid.UUID,
    tenant_id: Annotated[TenantId, Query()],
    graph: GraphDep,
    adverts: Service,
    last_event_id: Annotated[str | None, Header()] = None,
) -> StreamingResponse:
    """The state of each variant and the events so far, or those after Last-Event-ID; then every change."""
    updates = adverts.stream("follow", tenant_id, job_id)
    try:
        first: Progress = await asyncio.wait_for(anext(updates), FIRST_S)  # a refusal is a plain response, not a stream
    except TimeoutError as error:
        raise errors.too_late(adverts.name, FIRST_S) from error
    return sse.response(_stream(first, updates, graph.watch.stopping, last_event_id))


async def _stream(
    first: Progress, updates: AsyncIterator[Progress], stopping: asyncio.Event, last_event_id: str | None
) -> AsyncIterator[bytes]:
    variants: dict[str, dict[str, Any]] = {}
    ids = [event["event_id"] for event in first.events]
    sent = set(ids[: ids.index(last_event_id) + 1]) if last_event_id in ids else set()
    async with contextlib.aclosing(sse.with_pauses(sse.chained(first, updates), stopping)) as items:
        with contextlib.suppress(TimeoutError, DureError):
            async with asyncio.timeout(LONGEST_S):
                async for progress in items:
                    if progress is None:
                        yield sse.HEARTBEAT
                        continue
                    for variant in progress.variants:
                        if variants.get(variant["job_variants_id"]) != variant:
                            variants[variant["job_variants_id"]] = variant
                            yield sse.event(_shown(variant), "progress")
                    for event in progress.events:
                        if event["event_id"] not in sent:
                            sent.add(event["event_id"])
                            yield sse.event(event, event["type"], event["event_id"])


def _shown(variant: dict[str, Any]) -> dict[str, Any]:
    """The state in one word, with the place in the queue, from 1 and if known, or the tokens so far."""
    progress = variant["progress"] or {}
    shown = {name: variant[name] for name in ("job_variants_id", "step", "status")}
    if variant["status"] == "running":
        return shown | {"state": "running" if "tokens" in progress else "queued"} | progress
    return shown | {"state": variant["status"]} | ({"reason": variant["reason"]} if variant["reason"] else {})
