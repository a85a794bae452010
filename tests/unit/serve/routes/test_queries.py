"""What of an HTTP request comes to a model, and what becomes of its scores."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from deployments.messages import Text
from serve.caller import Caller
from serve.services.search import Found, Search
from tests.ingress import MODELS, Heard, Running, make_graph, running

JSON = "Content-Type: application/json"
TOO_SURE = [40.0, 90.0, 41.0, -90.0, -89.0, -1000.0]
"""Logits whose sigmoid is 1 or 0 in float32, several of them even in float64."""
IN_ORDER = [1, 2, 0, 4, 3, 5]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    models: dict[str, Any] = {**MODELS, "texts": {"task": "embedding", "source": "x", "token_ids": False}}
    with running(models) as server:
        yield server


def embed(server: Running, **fields: Any) -> Heard:
    return server.post("/v1/embeddings", json.dumps({"input": "rain", **fields}).encode(), JSON)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, Text("rain")),
        ({"input_type": "query"}, Text("rain", input_type="query")),
        ({"input_type": "document"}, Text("rain", input_type="document")),
        ({"input_type": None, "prompt_name": None}, Text("rain")),
        ({"prompt_name": "ask"}, Text("rain", prompt_name="ask")),
    ],
)
def test_how_a_text_is_meant_comes_to_the_model(server: Running, fields: dict[str, Any], text: Text) -> None:
    handle: Any = server.graph.models["embedder"].handle
    assert embed(server, **fields).status == 200
    assert handle.asked[-1] == text


@pytest.mark.parametrize("fields", [{"input_type": "question"}, {"input_type": 1}, {"prompt_name": ["ask"]}])
def test_what_a_text_cannot_be_meant_as_is_refused(server: Running, fields: dict[str, Any]) -> None:
    refused = embed(server, **fields)
    assert refused.status == 400
    assert refused.error["param"] == next(iter(fields))


@pytest.mark.parametrize("ids", [[1, 2, 3], [[1, 2], [3]]])
def test_token_ids_are_refused_where_the_config_says_so(server: Running, ids: Any) -> None:
    assert embed(server, input=ids).status == 200
    refused = embed(server, input=ids, model="texts")
    assert (refused.status, refused.error["param"]) == (400, "input")
    assert "check_embedding_ctx_length=False" in refused.error["message"]
    assert embed(server, input=["a", "b"], model="texts").status == 200


def test_rerank_orders_by_logits_where_scores_are_alike(server: Running) -> None:
    handle: Any = server.graph.models["reranker"].handle
    handle.logits = TOO_SURE
    body = json.dumps({"query": "q", "documents": [str(number) for number in range(6)]}).encode()
    results = server.post("/v1/rerank", body, JSON).content["results"]
    handle.logits = None
    assert [result["index"] for result in results] == IN_ORDER
    scores = [result["relevance_score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)


def test_search_orders_by_logits_where_scores_are_alike() -> None:
    async def main() -> tuple[Found, list[Text]]:
        search = object.__new__(Search)
        search.graph = make_graph({name: MODELS[name] | {"max_queue": 64} for name in ("embedder", "reranker")})
        handles: Any = {name: model.handle for name, model in search.graph.models.items()}
        handles["reranker"].logits = TOO_SURE
        found = await search.run("q", [str(number) for number in range(6)], 6, caller=Caller.waiting(10, "t"))
        return found, handles["embedder"].asked

    found, asked = asyncio.run(main())
    pairs = {hit.index for hit in found.hits}
    assert pairs == set(range(6))
    assert [hit.score for hit in found.hits] == sorted((hit.score for hit in found.hits), reverse=True)
    assert [text.input_type for text in asked] == ["document"] * 6 + ["query"]
    assert found.hits[0].score == found.hits[1].score == 1.0
