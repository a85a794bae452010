"""A user's service in a project outside Dure: its deployment and its endpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Response
from ray.serve.handle import DeploymentHandle

from deployments.messages import Embeddings, Text
from serve.caller import Caller
from serve.calls.graph import Graph
from serve.config.settings import Settings
from serve.http.early import calls
from serve.http.requests import GRACE_S, Body, CallerDep, GraphDep
from serve.http.respond import respond
from serve.progress import Following
from serve.services.base import Service

NAME = "likeness"

router = APIRouter()


class Likeness(Service):
    """Measures how similar two texts are."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, models: dict[str, DeploymentHandle]
    ) -> None:
        self.digits = settings.services[NAME].options["digits"]
        self.graph = Graph.of(settings, models, {}, patient=True)
        self.graph.start()

    async def run(self, first: str, second: str, *, caller: Caller, following: Following | None = None) -> float:
        texts = [Text(first), Text(second)]
        embedded: Embeddings = await self.graph.model("embedding").results(texts, caller, "texts", following)
        one, other = embedded.vectors / np.linalg.norm(embedded.vectors, axis=1, keepdims=True)
        return round(float(one @ other), self.digits)


class LikenessRequest(Body):
    first: str
    second: str


@router.post("/v1/likeness")
@calls(service=NAME)
async def likeness(body: LikenessRequest, graph: GraphDep, caller: CallerDep) -> Response:
    service = graph.service(NAME, "a model with task embedding")

    async def work(following: Following | None) -> dict[str, Any]:
        async with graph.admitted(service, caller, following):
            asked = (body.first, body.second)
            found = await service.call(*asked, caller=caller, admitted=True, grace_s=GRACE_S, following=following)
        return {"likeness": found}

    return await respond(caller, work)
