"""Sentence embeddings, with sentence-transformers' own modules behind batches of token ids."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from deployments.engines.tokens import Encoded, encode_one, pad
from deployments.items import Embeddings, Text
from deployments.loading import load_model
from deployments.progress import LoadProgress
from deployments.spec import Facts, ItemError, ModelSpec


class Embedder:
    """One item is one text's token ids; its result is a vector as sentence-transformers' `encode` makes it."""

    def __init__(self, model: SentenceTransformer, facts: Facts) -> None:
        self.model = model
        self.facts = facts
        self.tokenizer = model.tokenizer
        self.max_tokens = model.max_seq_length or 512
        self.prompt = model.prompts.get(model.default_prompt_name, "") if model.default_prompt_name else ""

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Embedder:
        progress.tokenizer()
        build = functools.partial(_sentence_transformer, folder)
        model, facts = load_model(build, folder, spec.precision, progress)
        return cls(model, facts)

    def warm_up(self) -> None:
        self.run([self.prepare(Text("warm up " * length)) for length in (1, 16)])

    def prepare(self, request: Text) -> Encoded:
        if isinstance(request.text, str):
            return encode_one(self.tokenizer, self.prompt + request.text, self.max_tokens, request.truncate)
        ids = request.text
        wrong = next((id for id in ids if not 0 <= id < len(self.tokenizer)), None)
        if wrong is not None:
            raise ItemError(f"token id {wrong} is not in the vocabulary of {len(self.tokenizer)} tokens")
        if len(ids) > self.max_tokens and not request.truncate:
            raise ItemError(f"{len(ids)} tokens are more than the model's {self.max_tokens}; send fewer")
        return Encoded(ids[: self.max_tokens])

    def cost(self, item: Encoded) -> int:
        return len(item.ids)

    @torch.inference_mode()
    def run(self, items: list[Encoded]) -> Embeddings:
        features = pad(items, self.tokenizer, self.model.device)
        vectors = self.model(features)["sentence_embedding"].float().cpu().numpy()
        return Embeddings(vectors, np.array([len(item.ids) for item in items], np.int32))


def _sentence_transformer(folder: Path, **model_kwargs: object) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", model_kwargs=model_kwargs, local_files_only=True)
