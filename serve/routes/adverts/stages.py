"""The two stages in which a vision model checks an advert on record."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import StringConstraints

from serve import errors
from serve.caller import Caller
from serve.calls.graph import Graph
from serve.config.settings import Limits
from serve.http.early import calls
from serve.http.requests import GRACE_S, Body, CallerDep, GraphDep, check_text
from serve.http.respond import respond
from serve.metrics import measured
from serve.progress import Following
from serve.routes.adverts.jobs import ModelName, TenantId
from serve.services.adverts.stages import VariantKey

router = APIRouter(prefix="/api/yh/llava", tags=["adverts"])

Text = Annotated[str, StringConstraints(strip_whitespace=True)]


class StageBody(Body):
    tenant_id: TenantId
    job_id: uuid.UUID
    job_variants_id: uuid.UUID
    model: ModelName | None = None

    @classmethod
    def max_bytes(cls, limits: Limits) -> int:
        return 2 * limits.max_message_bytes  # two texts

    @property
    def key(self) -> VariantKey:
        return VariantKey(self.tenant_id, self.job_id, self.job_variants_id)


class ValidateBody(StageBody):
    ad_copy_text: Text | None = None
    prompt: Text | None = None


class JudgeBody(StageBody):
    overlay_id: uuid.UUID | None = None
    render_asset_url: Text | None = None


@router.post("/stage1/validate")
@calls(service="adverts", queued=False)
async def validate(body: ValidateBody, graph: GraphDep, caller: CallerDep) -> Response:
    """Does the variant's image fit the ad copy?"""
    for name in ("ad_copy_text", "prompt"):
        _check(getattr(body, name), name, graph)
    return await _stage(graph, caller, "validate", body, body.ad_copy_text or None, body.prompt or None)


@router.post("/stage2/judge")
@calls(service="adverts", queued=False)
async def judge(body: JudgeBody, graph: GraphDep, caller: CallerDep) -> Response:
    """Is the variant's finished advert good?"""
    _check(body.render_asset_url, "render_asset_url", graph)
    return await _stage(graph, caller, "judge", body, body.overlay_id, body.render_asset_url or None)


async def _stage(graph: Graph, caller: Caller, method: str, body: StageBody, *arguments: object) -> Response:
    adverts = graph.service("adverts", "a model with task vision")
    caller = replace(caller, tenant=body.tenant_id)
    # The trace's id is created here, so that repeated calls are idempotent.
    asked = (body.key, uuid.uuid4(), body.model, *arguments)

    async def work(following: Following | None) -> dict[str, Any]:
        with measured(adverts.name):
            async with graph.admitted(adverts, caller, following):
                verdict: dict[str, Any] = await adverts.call(
                    *asked, caller=caller, method=method, admitted=True, grace_s=GRACE_S, following=following
                )
        return verdict

    return await respond(caller, work)


def _check(text: str | None, name: str, graph: Graph) -> None:
    check_text(text or "", name, graph.settings.limits)
    if text and "\0" in text:
        raise errors.invalid(f"{name} has a NUL character", name)
