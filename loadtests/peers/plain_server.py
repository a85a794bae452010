"""FastAPI with sentence-transformers, as most would write it first: a request's texts are one call in a thread."""

from __future__ import annotations

import asyncio

import uvicorn
from fastapi import FastAPI
from options import arguments, cross_encoder, embedder, embeddings, ranking
from pydantic import BaseModel

options = arguments()
app = FastAPI()


class EmbeddingRequest(BaseModel):
    input: str | list[str]


class RerankRequest(BaseModel):
    query: str
    documents: list[str]


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


if options.task == "embedding":
    encoder = embedder(options.model, options.precision)

    @app.post("/v1/embeddings")
    async def embed(body: EmbeddingRequest) -> dict[str, object]:
        texts = [body.input] if isinstance(body.input, str) else body.input
        vectors = await asyncio.to_thread(encoder.encode, texts, show_progress_bar=False)
        return embeddings(vectors.tolist())

else:
    scorer = cross_encoder(options.model, options.precision)

    @app.post("/v1/rerank")
    async def rerank(body: RerankRequest) -> dict[str, object]:
        pairs = [(body.query, document) for document in body.documents]
        scores = await asyncio.to_thread(scorer.predict, pairs, show_progress_bar=False)
        return ranking(scores.tolist())


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")
