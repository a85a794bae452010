"""Adverts without a database: one image in, one verdict out. Decoding is constrained to the verdict's JSON schema."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, File, Form, Response, UploadFile
from pydantic import BaseModel, StringConstraints

from deployments.messages import Answer, Question
from serve.caller import Caller
from serve.calls.graph import Graph
from serve.http.early import calls
from serve.http.forms import FormRoute
from serve.http.requests import CallerDep, GraphDep, check_text
from serve.http.respond import respond
from serve.images.uploaded import read_image
from serve.metrics import measured
from serve.progress import Following
from serve.routes.adverts.jobs import ModelName
from serve.services.adverts.verdicts import JUDGE, Judgement, Validation, validation_prompt

router = APIRouter(tags=["vision"], route_class=FormRoute)

Verdict = TypeVar("Verdict", bound=BaseModel)


@router.post("/v1/vision/validate")
@calls(task="vision")
async def validate(
    graph: GraphDep,
    caller: CallerDep,
    image: Annotated[UploadFile, File()],
    ad_copy_text: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1), Form()],
    prompt: Annotated[str | None, Form()] = None,
    model: Annotated[ModelName | None, Form()] = None,
) -> Response:
    """Does the image fit the ad copy?"""
    check_text(ad_copy_text, "ad_copy_text", graph.settings.limits)
    check_text(prompt or "", "prompt", graph.settings.limits)
    return await _ask(graph, caller, image, validation_prompt(ad_copy_text, prompt), Validation, model)


@router.post("/v1/vision/judge")
@calls(task="vision")
async def judge(
    graph: GraphDep,
    caller: CallerDep,
    image: Annotated[UploadFile, File()],
    model: Annotated[ModelName | None, Form()] = None,
) -> Response:
    """Is the finished advert good?"""
    return await _ask(graph, caller, image, JUDGE, Judgement, model)


async def _ask(
    graph: Graph, caller: Caller, image: UploadFile, prompt: str, verdict: type[Verdict], model_name: str | None
) -> Response:
    model = graph.model("vision", model_name)
    content = await read_image(image, graph.settings.limits)
    question = Question(content, prompt, json.dumps(verdict.model_json_schema()), caller.tenant)

    async def work(following: Following | None) -> dict[str, Any]:
        with measured(model.name):
            answers: list[Answer] = await model.results([question], caller, "image", following)
        return verdict.model_validate_json(answers[0].json).model_dump()

    return await respond(caller, work)
