"""Sentence embeddings, as sentence-transformers computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deployments.engines import calibration
from deployments.engines.encoder import WARM_UP, Encoder, load_encoder
from deployments.load_progress import LoadProgress
from deployments.messages import Embeddings, Text
from deployments.spec import ModelSpec


class Embedder:
    """One item is the token ids of one text. The vectors are those of sentence-transformers' `encode`."""

    runtimes = ("openvino", "torch")
    checks_files = True

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.facts = encoder.facts
        self.parallel = encoder.parallel
        self.max_tokens = encoder.max_tokens

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Embedder:
        return cls(load_encoder("sentence_embedding", spec, folder, progress))

    def warm_up(self) -> None:
        self.run([self.prepare(Text(text)) for text in WARM_UP])

    def prepare(self, request: Text) -> Any:
        if not isinstance(request.text, str):
            return self.encoder.prepare_ids(request.text, request.truncate)
        prompt = self.encoder.prompts.text(request.prompt_name, request.input_type)
        return self.encoder.prepare(request.text, None, request.truncate, prompt, request.input_type)

    def cost(self, item: Any) -> int:
        return self.encoder.tokens(item)

    def run(self, items: list[Any]) -> Embeddings:
        return Embeddings(self.encoder.rows(items), np.array([self.cost(item) for item in items], np.int32))

    @staticmethod
    def calibration() -> list[list[Text]]:
        texts = [Text(text) for text in calibration.read()["texts"]]
        return [texts[start : start + 8] for start in range(0, len(texts), 8)]

    @staticmethod
    def agreement(original: list[Embeddings], answers: list[Embeddings]) -> dict[str, float]:
        """5th percentile of the cosines between vectors of the same text."""
        first, second = (np.concatenate([batch.vectors for batch in batches]) for batches in (original, answers))
        return {"cosine_p5": calibration.cosine(first, second)}
