"""A cross-encoder: how well a document answers a query, read together."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import CrossEncoder

from deployments.engines.tokens import Encoded, encode_one, pad
from deployments.items import Pair, Scores
from deployments.loading import load_model
from deployments.progress import LoadProgress
from deployments.spec import CheckpointError, Facts, ModelSpec


class Reranker:
    """One item is a query and a document as one row of token ids; its result is their relevance, 0 to 1."""

    def __init__(self, model: CrossEncoder, facts: Facts) -> None:
        self.model = model
        self.facts = facts
        self.tokenizer = model.tokenizer
        self.max_tokens = model.max_seq_length or 512

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Reranker:
        progress.tokenizer()
        model, facts = load_model(functools.partial(_cross_encoder, folder), folder, spec.precision, progress)
        if model.num_labels != 1:
            raise CheckpointError(f"a cross-encoder has one logit; the model in {folder} has {model.num_labels}")
        return cls(model, facts)

    def warm_up(self) -> None:
        self.run([self.prepare(Pair("warm", "up " * length)) for length in (1, 16)])

    def prepare(self, request: Pair) -> Encoded:
        return encode_one(self.tokenizer, request.query, self.max_tokens, request.truncate, pair=request.document)

    def cost(self, item: Encoded) -> int:
        return len(item.ids)

    @torch.inference_mode()
    def run(self, items: list[Encoded]) -> Scores:
        features = pad(items, self.tokenizer, self.model.device)
        scores = torch.sigmoid(self.model(features)["scores"].float().reshape(-1)).cpu().numpy()
        return Scores(scores, np.array([len(item.ids) for item in items], np.int32))


def _cross_encoder(folder: Path, **model_kwargs: object) -> CrossEncoder:
    return CrossEncoder(str(folder), device="cpu", model_kwargs=model_kwargs, local_files_only=True)
