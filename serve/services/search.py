"""Search among the caller's documents: embed them, take the nearest, re-rank these with the cross-encoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ray.serve.handle import DeploymentHandle

from deployments.messages import Embeddings, Pair, Scores, Text, sigmoid
from serve.caller import Caller
from serve.calls.graph import Graph
from serve.config.settings import Settings
from serve.progress import Following
from serve.services.base import Service

MIN_CANDIDATES = 20
CANDIDATES_PER_RESULT = 4
"""How many of the nearest documents the cross-encoder reads: enough to correct the embedder's order."""


@dataclass(frozen=True)
class Hit:
    index: int
    score: float
    """From the cross-encoder, 0 to 1."""


@dataclass(frozen=True)
class Found:
    hits: list[Hit]
    """Best first."""
    tokens: int


class Search(Service):
    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, models: dict[str, DeploymentHandle]
    ) -> None:
        self.graph = Graph.of(settings, models, {}, patient=True)
        self.graph.start()

    async def run(
        self,
        query: str,
        documents: list[str],
        top_k: int,
        *,
        caller: Caller,
        following: Following | None = None,
    ) -> Found:
        """The best `top_k` documents. Raises DureError naming the field at fault."""
        texts = [*(Text(text, input_type="document") for text in documents), Text(query, input_type="query")]
        embedded: Embeddings = await self.graph.model("embedding").results(
            texts, caller, "documents", following and following.at("embedding")
        )
        vectors = embedded.vectors / np.maximum(np.linalg.norm(embedded.vectors, axis=1, keepdims=True), 1e-12)
        count = min(len(documents), max(MIN_CANDIDATES, CANDIDATES_PER_RESULT * top_k))
        nearest = np.argsort(-(vectors[:-1] @ vectors[-1]), kind="stable")[:count].tolist()
        pairs = [Pair(query, documents[index]) for index in nearest]
        scored: Scores = await self.graph.model("rerank").results(
            pairs, caller, "documents", following and following.at("ranking")
        )
        best = np.argsort(-scored.logits, kind="stable")[:top_k].tolist()
        relevance = sigmoid(scored.logits)
        tokens = int(embedded.tokens.sum() + scored.tokens.sum())
        return Found([Hit(nearest[place], float(relevance[place])) for place in best], tokens)
