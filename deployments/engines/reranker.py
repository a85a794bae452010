"""A cross-encoder: how well a document answers a query, read together."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import CrossEncoder

from deployments import calibration
from deployments.engines.forward import WARM_UP, Runner, load_runner
from deployments.engines.tokens import Encoded
from deployments.items import Pair, Scores
from deployments.progress import LoadProgress
from deployments.spec import CheckpointError, ModelSpec

CALIBRATION_DOCUMENTS = 8
"""For each query."""


class Reranker:
    """One item is a query and a document as one row of token ids; its result is their relevance, 0 to 1."""

    runtimes = ("openvino", "torch")

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.facts = runner.facts
        self.tokenizer = runner.encoder.tokenizer
        self.max_tokens = runner.encoder.max_tokens

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Reranker:
        progress.tokenizer()
        return cls(load_runner(functools.partial(_cross_encoder, folder), "scores", spec, folder, progress))

    def warm_up(self) -> None:
        self.run([self.prepare(Pair("warm", text)) for text in WARM_UP])

    def prepare(self, request: Pair) -> Encoded:
        return self.runner.encoder.encode(request.query, request.document, request.truncate)

    def cost(self, item: Encoded) -> int:
        return len(item.ids)

    def run(self, items: list[Encoded]) -> Scores:
        logits = torch.from_numpy(self.runner.rows(items)).reshape(-1)
        return Scores(torch.sigmoid(logits).numpy(), np.array([len(item.ids) for item in items], np.int32))

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
        """Spearman's correlation of all scores, the share of queries with the same document first, and a cosine.

        A document that the original scores as high as its first one is a first one, too.
        """
        first, second = (np.stack([batch.scores for batch in batches]) for batches in (original, answers))
        same = first[np.arange(len(first)), second.argmax(axis=1)] == first.max(axis=1)
        return {
            "spearman": calibration.spearman(first.ravel(), second.ravel()),
            "same_first": float(same.mean()),
            "scores_cosine": calibration.cosine(first.reshape(1, -1), second.reshape(1, -1)),
        }


def _cross_encoder(folder: Path, **model_kwargs: object) -> CrossEncoder:
    model = CrossEncoder(str(folder), device="cpu", model_kwargs=model_kwargs, local_files_only=True)
    if model.num_labels != 1:
        raise CheckpointError(f"a cross-encoder has one logit; the model in {folder} has {model.num_labels}")
    return model
