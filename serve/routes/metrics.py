"""Prometheus metrics of the whole cluster, in one exposition."""

from __future__ import annotations

import asyncio
import contextlib

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from ray.exceptions import RayError

from serve import errors
from serve.board.actor import board
from serve.errors import DureError
from serve.http.requests import GraphDep
from serve.metrics import REGISTRY, exposition, of_lanes

router = APIRouter(tags=["metrics"])

TIMEOUT_S = 5.0


@router.get("/metrics", response_class=Response)
async def metrics(graph: GraphDep) -> Response:
    """Metrics of every process of the cluster: this one's current values, and the last reports of the others.

    Metrics of the lanes are included while admission answers.
    """
    try:
        actor = await asyncio.to_thread(board)
        processes = await asyncio.wait_for(actor.metrics.remote(), TIMEOUT_S)
    except (RayError, TimeoutError, ValueError) as error:  # ValueError: the board has just died
        raise errors.no_board() from error
    processes[graph.me] = list(REGISTRY.collect())
    with contextlib.suppress(DureError):
        processes["admission", ""] = of_lanes((await graph.lanes.queues())["lanes"])
    return Response(exposition(processes), media_type=CONTENT_TYPE_LATEST)
