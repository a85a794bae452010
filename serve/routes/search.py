"""Search in the documents of a request."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import Field

from serve.config.settings import Limits
from serve.http.early import calls
from serve.http.requests import GRACE_S, Body, CallerDep, GraphDep, check_text, check_texts
from serve.http.respond import respond
from serve.metrics import measured
from serve.progress import Following
from serve.services.search import Found

router = APIRouter(tags=["search"])


MAX_TOP_K = 256
"""Most results; the cross-encoder reads four documents for each."""


class SearchRequest(Body):
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[str], Field(fail_fast=True)]
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K, strict=True)] = 5

    @classmethod
    def max_bytes(cls, limits: Limits) -> int:
        return limits.max_body_bytes


@router.post("/v1/search")
@calls(service="search")
async def search(body: SearchRequest, graph: GraphDep, caller: CallerDep) -> Response:
    """Embed, take the nearest documents, rerank: the best documents first, with scores between 0 and 1."""
    service = graph.service("search", "a model with task embedding and one with task rerank")
    check_text(body.query, "query", graph.settings.limits)
    check_texts(body.documents, "documents", graph.settings.limits)

    async def work(following: Following | None) -> dict[str, Any]:
        with measured(service.name):
            async with graph.admitted(service, caller, following):
                asked = (body.query, body.documents, body.top_k)
                found: Found = await service.call(
                    *asked, caller=caller, admitted=True, grace_s=GRACE_S, following=following
                )
        hits = [{"index": hit.index, "score": hit.score, "document": body.documents[hit.index]} for hit in found.hits]
        return {"results": hits, "usage": {"total_tokens": found.tokens}}

    return await respond(caller, work)
