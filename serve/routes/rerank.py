"""Reranking in the format of Cohere's and Jina's APIs."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Response
from pydantic import Field, PlainValidator

from deployments.messages import Pair, Scores, sigmoid
from serve.config.settings import Limits
from serve.http.early import calls
from serve.http.requests import Body, CallerDep, GraphDep, check_text, check_texts
from serve.http.respond import respond
from serve.metrics import measured
from serve.progress import Following

router = APIRouter(tags=["rerank"])


class Document(Body):
    text: str


def _documents(given: Any) -> list[str]:
    """The documents' texts, validated by hand, as pydantic would collect errors for every entry of a long list."""
    if not isinstance(given, list):
        raise ValueError("takes a list of texts or of objects with `text`")
    texts: list[Any] = [entry.get("text") if isinstance(entry, dict) else entry for entry in given]
    wrong = next((number for number, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"entry {wrong} is neither a text nor an object with `text`")
    return texts


class RerankRequest(Body):
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[str], PlainValidator(_documents, json_schema_input_type=list[str | Document])]
    model: str | None = None
    top_n: Annotated[int, Field(ge=1, strict=True)] | None = None
    return_documents: bool = False
    truncate: bool = True
    """Dure's extension: if false, a pair longer than the model allows is a 400."""

    @classmethod
    def max_bytes(cls, limits: Limits) -> int:
        return limits.max_body_bytes


@router.post("/v1/rerank")
@calls(task="rerank")
async def rerank(body: RerankRequest, graph: GraphDep, caller: CallerDep) -> Response:
    """Documents ranked by how well they answer the query, best first, with scores between 0 and 1."""
    model = graph.model("rerank", body.model)
    texts = body.documents
    check_text(body.query, "query", graph.settings.limits)
    check_texts(texts, "documents", graph.settings.limits)
    pairs = [Pair(body.query, text, body.truncate) for text in texts]

    async def work(following: Following | None) -> dict[str, Any]:
        with measured(model.name):
            found: Scores = await model.results(pairs, caller, "documents", following)
        scores = sigmoid(found.logits).tolist()
        order = np.argsort(-found.logits, kind="stable")[: body.top_n].tolist()
        results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in order]
        if body.return_documents:
            results = [result | {"document": {"text": texts[result["index"]]}} for result in results]
        return {"model": model.name, "results": results, "usage": {"total_tokens": int(found.tokens.sum())}}

    return await respond(caller, work)
