"""Loading progress of every replica, as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from serve import errors
from serve.board.reports import Replica
from serve.board.watch import Watch
from serve.http import sse
from serve.http.requests import GraphDep

router = APIRouter(tags=["models"])


@router.get("/model/upload-stream", response_class=StreamingResponse)
async def upload_stream(graph: GraphDep, model: str | None = None, follow: bool = False) -> StreamingResponse:
    """Each replica's current state, then its changes. Ends once all replicas shown are ready or failed.

    With `follow` it continues until the server stops. Sleeping models are left out, unless one is named with `model`:
    then the stream waits for it.
    """
    if model is not None and model not in graph.models:
        raise errors.not_found(f"no model {model!r}; the models are {', '.join(graph.models)}", "model")
    names = [model] if model else [name for name in graph.models if graph.watch.state(name) != "asleep"]
    return sse.response(_stream(graph.watch, names, follow))


async def _stream(watch: Watch, names: list[str], follow: bool) -> AsyncIterator[bytes]:
    shown: dict[str, Replica] = {}
    with watch.subscribe() as changes:
        for name in names:
            for replica in watch.of(name):
                shown[replica.replica] = replica
                yield _event(replica)
        if not follow and _finished(names, shown):
            return
        async with contextlib.aclosing(sse.with_pauses(_each(changes), watch.stopping)) as updates:
            async for changed in updates:
                if changed is None:
                    yield sse.HEARTBEAT
                    continue
                before = shown.get(changed.replica)
                if changed.model in names and (before is None or before.event != changed.event):
                    shown[changed.replica] = changed
                    yield _event(changed)
                if not follow and _finished(names, shown):
                    return


async def _each(changes: asyncio.Queue[Replica]) -> AsyncIterator[Replica]:
    while True:
        yield await changes.get()


def _finished(names: list[str], shown: dict[str, Replica]) -> bool:
    """Whether each model has a replica among those shown, and all of those are ready or failed."""
    settled = all(replica.event.status in ("ready", "failed") for replica in shown.values())
    return settled and {replica.model for replica in shown.values()} == set(names)


def _event(replica: Replica) -> bytes:
    event = replica.event
    data = {
        "model": replica.model,
        "replica": replica.replica,
        "status": event.status,
        "progress": event.progress,
        "message": event.message,
        "message_ko": event.message_ko,
        "shard": event.shard,
        "shards": event.shards,
    }
    return sse.event(data)
