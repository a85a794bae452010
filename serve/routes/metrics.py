"""Prometheus metrics of the whole cluster, in one exposition."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from serve.board import board
from serve.metrics import REGISTRY, exposition
from serve.routes.common import GraphDep

router = APIRouter(tags=["metrics"])

TIMEOUT_S = 5.0


@router.get("/metrics", response_class=Response)
async def metrics(graph: GraphDep) -> Response:
    """Every process of the cluster, each once: this one as it is now, the others as they last reported."""
    actor = await asyncio.to_thread(board)
    processes = await asyncio.wait_for(actor.metrics.remote(), TIMEOUT_S)
    processes[graph.me] = list(REGISTRY.collect())
    return Response(exposition(processes), media_type=CONTENT_TYPE_LATEST)
