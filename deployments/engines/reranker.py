"""A cross-encoder: reads a query and a document together and scores how well the document answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deployments.engines import calibration
from deployments.engines.encoder import WARM_UP, Encoder, load_encoder
from deployments.load_progress import LoadProgress
from deployments.messages import Pair, Scores, sigmoid
from deployments.spec import ModelSpec

CALIBRATION_DOCUMENTS = 8
"""Documents per query."""


class Reranker:
    """One item is a query and a document as one row of token ids. Its result is the model's logit."""

    runtimes = ("openvino", "torch")
    checks_files = True

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.facts = encoder.facts
        self.parallel = encoder.parallel
        self.max_tokens = encoder.max_tokens

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Reranker:
        return cls(load_encoder("scores", spec, folder, progress))

    def warm_up(self) -> None:
        self.run([self.prepare(Pair("warm", text)) for text in WARM_UP])

    def prepare(self, request: Pair) -> Any:
        return self.encoder.prepare(request.query, request.document, request.truncate, self.encoder.prompts.default)

    def cost(self, item: Any) -> int:
        return self.encoder.tokens(item)

    def run(self, items: list[Any]) -> Scores:
        return Scores(self.encoder.rows(items).reshape(-1), np.array([self.cost(item) for item in items], np.int32))

    @staticmethod
    def calibration() -> list[list[Pair]]:
        texts = calibration.read()
        documents = texts["documents"] * 2
        return [
            [Pair(query, document) for document in documents[place : place + CALIBRATION_DOCUMENTS]]
            for place, query in enumerate(texts["queries"])
        ]

    @staticmethod
    def agreement(original: list[Scores], answers: list[Scores]) -> dict[str, float]:
        """Spearman's correlation of all logits, share of queries with the same first document, and cosine of scores.

        Every document that ties for first place in the original counts as first.
        """
        first, second = (np.stack([batch.logits for batch in batches]) for batches in (original, answers))
        same = first[np.arange(len(first)), second.argmax(axis=1)] == first.max(axis=1)
        return {
            "spearman": calibration.spearman(first.ravel(), second.ravel()),
            "same_first": float(same.mean()),
            "scores_cosine": calibration.cosine(sigmoid(first).reshape(1, -1), sigmoid(second).reshape(1, -1)),
        }
