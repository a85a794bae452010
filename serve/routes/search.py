"""Search among the documents of the request."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import Field

from serve.metrics import measured
from serve.routes.common import Body, GraphDep, answer, check_text, check_texts
from serve.services.search import Found

router = APIRouter(tags=["search"])


class SearchRequest(Body):
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[str], Field(fail_fast=True)]
    top_k: Annotated[int, Field(ge=1, strict=True)] = 5


@router.post("/v1/search")
async def search(body: SearchRequest, graph: GraphDep) -> Response:
    """Embed, take the nearest, re-rank: the best documents first, scored between 0 and 1."""
    service = graph.service("search", "a model with task embedding and one with task rerank")
    check_text(body.query, "query", graph.settings.limits)
    check_texts(body.documents, "documents", graph.settings.limits)
    timeout_s = graph.settings.request_timeout_s
    with measured(service.name):
        found: Found = await service.call(body.query, body.documents, body.top_k, timeout_s, timeout_s=timeout_s)
    results = [{"index": hit.index, "score": hit.score, "document": body.documents[hit.index]} for hit in found.hits]
    return answer({"results": results, "usage": {"total_tokens": found.tokens}})
