"""LitServe with sentence-transformers: requests share batches, and the texts of a batch are encoded together.

LitServe reads the annotation of `request`, and passes the parsed JSON only if there is none. With a batch size of 1 it
calls `predict` with one request instead of a list, so the smallest batch size here is 2.
"""

from __future__ import annotations

import argparse
from itertools import islice

import litserve
from options import arguments, cross_encoder, embedder, embeddings, ranking


class Embeddings(litserve.LitAPI):
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.max_batch_size, options.batch_timeout, api_path="/v1/embeddings")
        self.options = options

    def setup(self, device: str) -> None:
        self.model = embedder(self.options.model, self.options.precision)

    def decode_request(self, request) -> list[str]:
        texts: str | list[str] = request["input"]
        return [texts] if isinstance(texts, str) else texts

    def predict(self, batch: list[list[str]]) -> list[list[list[float]]]:
        texts = [text for request in batch for text in request]
        vectors = iter(self.model.encode(texts, show_progress_bar=False).tolist())
        return [list(islice(vectors, len(request))) for request in batch]

    def encode_response(self, output: list[list[float]]) -> dict[str, object]:
        return embeddings(output)


class Rerank(litserve.LitAPI):
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.max_batch_size, options.batch_timeout, api_path="/v1/rerank")
        self.options = options

    def setup(self, device: str) -> None:
        self.model = cross_encoder(self.options.model, self.options.precision)

    def decode_request(self, request) -> list[tuple[str, str]]:
        return [(request["query"], document) for document in request["documents"]]

    def predict(self, batch: list[list[tuple[str, str]]]) -> list[list[float]]:
        pairs = [pair for request in batch for pair in request]
        scores = iter(self.model.predict(pairs, show_progress_bar=False).tolist())
        return [list(islice(scores, len(request))) for request in batch]

    def encode_response(self, output: list[float]) -> dict[str, object]:
        return ranking(output)


if __name__ == "__main__":
    options = arguments()
    api = Embeddings(options) if options.task == "embedding" else Rerank(options)
    server = litserve.LitServer(api, accelerator="cpu", timeout=60)
    server.run(host="127.0.0.1", port=options.port, log_level="warning", generate_client_file=False)
