"""Next-word prediction."""

from __future__ import annotations

from typing import Annotated

import orjson
from fastapi import APIRouter, Response
from pydantic import Field

from deployments.messages import Prompt
from serve.caller import Caller
from serve.calls.graph import Graph
from serve.config.settings import Limits
from serve.http.early import calls
from serve.http.requests import Body, CallerDep, GraphDep, answer, check_text
from serve.metrics import measured

router = APIRouter(tags=["next word"])


class PredictRequest(Body):
    text: str
    top_k: Annotated[int, Field(ge=1, le=50, strict=True)] = 5
    temperature: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 0.8
    complete_word: bool = True
    model: str | None = None

    @classmethod
    def max_bytes(cls, limits: Limits) -> int:
        return limits.max_message_bytes


@router.post("/predict")
@calls(task="next_word", cached=True)
async def predict(body: PredictRequest, graph: GraphDep, caller: CallerDep) -> Response:
    """The most likely next words, best first; with `complete_word: false`, single tokens."""
    model, words = await next_words(body, graph, caller)
    return answer({"predictions": words, "model": model})


async def next_words(body: PredictRequest, graph: Graph, caller: Caller) -> tuple[str, orjson.Fragment]:
    """The name of the model that answers, and its words as JSON. Raises DureError."""
    check_text(body.text, "text", graph.settings.limits)
    model = graph.model("next_word", body.model)
    prompt = Prompt(body.text, body.top_k, body.temperature, body.complete_word, caller.tenant)
    with measured(model.name):
        words = await graph.predictions.of(model, prompt, caller)
    return model.name, orjson.Fragment(words)
