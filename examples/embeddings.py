"""Embeddings with OpenAI's client: which document is nearest to a question?

Beside a running server, with `pip install openai`: python examples/embeddings.py
"""

from __future__ import annotations

import os

from openai import OpenAI

QUESTION = "When is the deposit returned?"
DOCUMENTS = [
    "It rains in April.",
    "The landlord returns the deposit within 14 days.",
    "Bake for an hour.",
]

url = os.environ.get("DURE_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key="none")  # the client insists on a key, Dure asks for none


def embed(texts: list[str], input_type: str) -> list[list[float]]:
    """A vector of length 1 for each text, with the model's own prompt for queries or for documents."""
    answer = client.embeddings.create(model="embedder", input=texts, extra_body={"input_type": input_type})
    return [entry.embedding for entry in answer.data]


[query] = embed([QUESTION], "query")
vectors = embed(DOCUMENTS, "document")
cosines = [sum(a * b for a, b in zip(query, vector, strict=True)) for vector in vectors]
for cosine, document in sorted(zip(cosines, DOCUMENTS, strict=True), reverse=True):
    print(f"{cosine:6.3f}  {document}")
