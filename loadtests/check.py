"""Checks a server's answers while many requests are in flight, against those of the bare model in fp32."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from sentence_transformers import CrossEncoder, SentenceTransformer

from loadtests.load import texts
from loadtests.servers import Server

IN_FLIGHT = 16
WAVES = 3
MIN_COSINE = 0.99
MIN_RANK_CORRELATION = 0.97


class WrongAnswers(Exception):
    """A server's answers differ from the model's."""


class EmbeddingCheck:
    """Every vector belongs to its text: near the model's vector for it, and nearest to that one among all."""

    def __init__(self, folder: Path) -> None:
        drawn = iter(texts(1000, 4, 250, seed=1))
        self.requests = [[next(drawn) for _ in range(1 + number % 4)] for number in range(IN_FLIGHT * WAVES)]
        model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        self.expected = [_unit(model.encode(request, show_progress_bar=False)) for request in self.requests]

    def __call__(self, server: Server) -> None:
        """Raises WrongAnswers."""
        answers = asyncio.run(_ask(server, [{"input": request} for request in self.requests]))
        vectors = [_unit(np.array([entry["embedding"] for entry in _by_index(answer["data"])])) for answer in answers]
        if [len(rows) for rows in vectors] != [len(rows) for rows in self.expected]:
            raise WrongAnswers(f"{server.name}: not one vector for each text")
        cosines = np.concatenate(vectors) @ np.concatenate(self.expected).T
        worst = float(cosines.diagonal().min())
        if worst < MIN_COSINE or (cosines.argmax(axis=1) != np.arange(len(cosines))).any():
            raise WrongAnswers(f"{server.name} ({server.settings}): cosine with the model's vector {worst:.4f}")


class RerankCheck:
    """Every ranking belongs to its request: ordered as the model orders it, more closely than any other request's."""

    def __init__(self, folder: Path, documents: int) -> None:
        drawn = iter(texts(IN_FLIGHT * documents, 12, 60, seed=1))
        self.requests = [
            {"query": f"what is said about case {number}", "documents": [next(drawn) for _ in range(documents)]}
            for number in range(IN_FLIGHT)
        ]
        model = CrossEncoder(str(folder), device="cpu", local_files_only=True)
        pairs = [(str(request["query"]), text) for request in self.requests for text in request["documents"]]
        self.expected = model.predict(pairs, show_progress_bar=False).reshape(IN_FLIGHT, documents)

    def __call__(self, server: Server) -> None:
        """Raises WrongAnswers."""
        answers = asyncio.run(_ask(server, self.requests))
        scores = np.array([[entry["relevance_score"] for entry in _by_index(each["results"])] for each in answers])
        if scores.shape != self.expected.shape:
            raise WrongAnswers(f"{server.name}: not one score for each document")
        correlations = np.corrcoef(_ranks(scores), _ranks(self.expected))[: len(scores), len(scores) :]
        worst = float(correlations.diagonal().min())
        if worst < MIN_RANK_CORRELATION or (correlations.argmax(axis=1) != np.arange(len(scores))).any():
            raise WrongAnswers(
                f"{server.name} ({server.settings}): rank correlation with the model's order {worst:.4f}"
            )


async def _ask(server: Server, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers, in order, with IN_FLIGHT requests at once. Raises WrongAnswers for any status but 200."""
    answers: list[dict[str, Any]] = []
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=IN_FLIGHT)) as client:
        for start in range(0, len(bodies), IN_FLIGHT):
            wave = [client.post(server.url, json=body) for body in bodies[start : start + IN_FLIGHT]]
            for response in await asyncio.gather(*wave):
                if response.status_code != 200:
                    raise WrongAnswers(
                        f"{server.name} ({server.settings}): {response.status_code} {response.text[:300]}"
                    )
                answers.append(response.json())
    return answers


def _by_index(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(entries, key=lambda entry: int(entry["index"]))


def _unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _ranks(rows: Any) -> Any:
    return rows.argsort(axis=1).argsort(axis=1)
