"""Sentence embeddings, with sentence-transformers' own modules behind batches of token ids."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from deployments import calibration
from deployments.engines.forward import WARM_UP, Runner, load_runner
from deployments.engines.tokens import Encoded
from deployments.items import Embeddings, Text
from deployments.progress import LoadProgress
from deployments.spec import ItemError, ModelSpec


class Embedder:
    """One item is one text's token ids; a batch's vectors are those that sentence-transformers' `encode` makes."""

    runtimes = ("openvino", "torch")

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.facts = runner.facts
        self.tokenizer = runner.encoder.tokenizer
        self.max_tokens = runner.encoder.max_tokens
        self.vocabulary = len(self.tokenizer)

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Embedder:
        progress.tokenizer()
        build = functools.partial(_sentence_transformer, folder)
        return cls(load_runner(build, "sentence_embedding", spec, folder, progress))

    def warm_up(self) -> None:
        self.run([self.prepare(Text(text)) for text in WARM_UP])

    def prepare(self, request: Text) -> Encoded:
        if isinstance(request.text, str):
            return self.runner.encoder.encode(self.runner.prompt + request.text, truncate=request.truncate)
        ids = request.text
        wrong = next((id for id in ids if not 0 <= id < self.vocabulary), None)
        if wrong is not None:
            raise ItemError(f"token id {wrong} is not in the vocabulary of {self.vocabulary} tokens")
        if len(ids) > self.max_tokens and not request.truncate:
            raise ItemError(f"{len(ids)} tokens are more than the model's {self.max_tokens}; send fewer")
        return Encoded(np.array(ids[: self.max_tokens], np.int64))

    def cost(self, item: Encoded) -> int:
        return len(item.ids)

    def run(self, items: list[Encoded]) -> Embeddings:
        return Embeddings(self.runner.rows(items), np.array([len(item.ids) for item in items], np.int32))

    @staticmethod
    def calibration() -> list[list[Text]]:
        texts = [Text(text) for text in calibration.read()["texts"]]
        return [texts[start : start + 8] for start in range(0, len(texts), 8)]

    @staticmethod
    def agreement(original: list[Embeddings], answers: list[Embeddings]) -> dict[str, float]:
        """The 5th percentile of the cosines between vectors of the same text."""
        first, second = (np.concatenate([batch.vectors for batch in batches]) for batches in (original, answers))
        return {"cosine_p5": calibration.cosine(first, second)}


def _sentence_transformer(folder: Path, **model_kwargs: object) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", model_kwargs=model_kwargs, local_files_only=True)
