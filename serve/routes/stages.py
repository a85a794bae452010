"""The two stages in which a vision model looks at an advert that is on record."""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import StringConstraints

from serve import errors
from serve.graph import Graph
from serve.metrics import measured
from serve.routes.common import Body, GraphDep, answer, check_text
from serve.routes.jobs import TenantId
from serve.store.stages import Which

router = APIRouter(prefix="/api/yh/llava", tags=["adverts"])

GRACE_S = 5.0
"""After the deadline, for putting on record that it has passed."""

Text = Annotated[str, StringConstraints(strip_whitespace=True)]


class StageBody(Body):
    tenant_id: TenantId
    job_id: uuid.UUID
    job_variants_id: uuid.UUID
    model: str | None = None

    @property
    def which(self) -> Which:
        return Which(self.tenant_id, self.job_id, self.job_variants_id)


class ValidateBody(StageBody):
    ad_copy_text: Text | None = None
    prompt: Text | None = None


class JudgeBody(StageBody):
    overlay_id: uuid.UUID | None = None
    render_asset_url: Text | None = None


@router.post("/stage1/validate")
async def validate(body: ValidateBody, graph: GraphDep) -> Response:
    """Does the variant's image fit the ad copy?"""
    for name in ("ad_copy_text", "prompt"):
        _check(getattr(body, name), name, graph)
    return await _stage(graph, "validate", body, body.ad_copy_text or None, body.prompt or None)


@router.post("/stage2/judge")
async def judge(body: JudgeBody, graph: GraphDep) -> Response:
    """Is the variant's finished advert good?"""
    _check(body.render_asset_url, "render_asset_url", graph)
    return await _stage(graph, "judge", body, body.overlay_id, body.render_asset_url or None)


async def _stage(graph: Graph, method: str, body: StageBody, *arguments: object) -> Response:
    adverts = graph.service("adverts", "a model with task vision")
    timeout_s = graph.settings.request_timeout_s
    with measured(adverts.name):
        # The trace's id is made here: a call that is made again is the same call.
        verdict = await adverts.call(
            body.which, uuid.uuid4(), body.model, *arguments, timeout_s, method=method, timeout_s=timeout_s + GRACE_S
        )
    return answer(verdict)


def _check(text: str | None, name: str, graph: Graph) -> None:
    check_text(text or "", name, graph.settings.limits)
    if text and "\0" in text:
        raise errors.invalid(f"{name} has a NUL character", name)
