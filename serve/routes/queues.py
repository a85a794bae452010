"""The queues of the whole cluster."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from fastapi import APIRouter

from serve.http.requests import CallerDep, GraphDep

router = APIRouter(tags=["queues"])


@router.get("/v1/queues")
async def queues(graph: GraphDep, caller: CallerDep) -> dict[str, Any]:
    """Each service's lane and each model's queue: running, waiting, rejected, service times and the estimated wait.

    Lanes count requests. Models count turns: 1 per item, plus 1 for every 64 tokens or so.

    A lane also shows how many requests of the caller's own tenant wait. Other tenants are not named.
    """
    found = await graph.lanes.queues()
    gates: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for gate in found["models"]:
        gates[gate["name"]].append(gate)
    lanes = [_lane(name, standing, caller.tenant) for name, standing in found["lanes"].items()]
    return {"object": "queues", "lanes": lanes, "models": [_model(name, gates[name]) for name in graph.models]}


def _lane(name: str, standing: dict[str, Any], tenant: str) -> dict[str, Any]:
    by_tenant: dict[str, int] = standing["waiting_by_tenant"]
    shown = {field: value for field, value in standing.items() if field != "waiting_by_tenant"}
    return {"name": name, **shown, "waiting_of_tenant": by_tenant.get(tenant, 0)}


def _model(name: str, gates: list[dict[str, Any]]) -> dict[str, Any]:
    """A model's queue, summed over the gates of all processes that call it. Their service rates add up as well."""
    busy = [gate for gate in gates if gate["service_time_p50_s"] is not None]
    turns = sum(gate["turns"] for gate in gates)
    running = sum(gate["running"] for gate in gates)
    rate = sum(1 / gate["seconds_per_turn"] for gate in busy)
    return {
        "name": name,
        "running": running,
        "waiting": turns - running,
        "rejected": sum(gate["rejected"] for gate in gates),
        "max_queue": sum(gate["max_turns"] for gate in gates),
        "tickets": sum(gate["tickets"] for gate in gates),
        "service_time_p50_s": max((gate["service_time_p50_s"] for gate in busy), default=None),
        "estimated_wait_s": round(turns / rate, 3) if rate else 0.0,
    }
