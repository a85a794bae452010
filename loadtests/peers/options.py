"""Shared by the servers of this folder: their command line, the models they load, and the shape of their answers."""

from __future__ import annotations

import argparse

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=("embedding", "rerank"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--precision", choices=DTYPES, required=True)
    parser.add_argument("--max-batch-size", type=int, default=32)
    parser.add_argument("--batch-timeout", type=float, default=0.0)
    return parser.parse_args()


def embedder(folder: str, precision: str) -> SentenceTransformer:
    return SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": DTYPES[precision]}, local_files_only=True)


def cross_encoder(folder: str, precision: str) -> CrossEncoder:
    return CrossEncoder(folder, device="cpu", model_kwargs={"dtype": DTYPES[precision]}, local_files_only=True)


def embeddings(vectors: list[list[float]]) -> dict[str, object]:
    """The answer in OpenAI's shape."""
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return {"object": "list", "data": data}


def ranking(scores: list[float]) -> dict[str, object]:
    """The answer in Cohere's shape, best first."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return {"results": [{"index": index, "relevance_score": scores[index]} for index in order]}
