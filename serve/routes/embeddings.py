"""OpenAI's embeddings API."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Response
from pydantic import Field, PlainValidator

from deployments.messages import Embeddings, InputType, Text
from serve import errors
from serve.config.settings import Limits
from serve.http.early import calls
from serve.http.requests import Body, CallerDep, GraphDep, check_texts
from serve.http.respond import respond
from serve.metrics import measured
from serve.progress import Following

router = APIRouter(tags=["embeddings"])


Input = str | list[str] | list[int] | list[list[int]]


def _input(given: Any) -> Input:
    """Validates by hand, as pydantic would collect errors for every entry of a long list and every allowed type."""
    if isinstance(given, list):
        kinds = {type(entry) for entry in given}
        if kinds == {list}:
            kinds = {type(token) for ids in given for token in ids}
            if kinds <= {int}:
                return given
        elif kinds <= {str} or kinds <= {int}:
            return given
    elif isinstance(given, str):
        return given
    raise ValueError("takes a text, a list of texts, a list of token ids, or a list of lists of token ids")


class EmbeddingsRequest(Body):
    input: Annotated[Input, PlainValidator(_input, json_schema_input_type=Input)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, strict=True)] | None = None
    user: str | None = None
    truncate: bool = True
    """Dure's extension: if false, a text longer than the model allows is a 400."""
    prompt_name: str | None = None
    """Dure's extension, as in sentence-transformers: which of the model's prompts to put before each text."""
    input_type: InputType | None = None
    """Dure's extension: `query` or `document`; the model's prompt for that kind of text is put before each text."""

    @classmethod
    def max_bytes(cls, limits: Limits) -> int:
        return limits.max_body_bytes


@router.post("/v1/embeddings")
@calls(task="embedding")
async def embeddings(body: EmbeddingsRequest, graph: GraphDep, caller: CallerDep) -> Response:
    """Vectors for one or many inputs, given as texts or as token ids from the model's own tokenizer."""
    model = graph.model("embedding", body.model)
    given = _texts(body.input, graph.settings.limits)
    if isinstance(given[0], list) and not model.takes_token_ids:
        raise errors.invalid(
            f"model {model.name} takes no token ids, as ids from another tokenizer would be meaningless; send texts "
            "(LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False)",
            "input",
        )
    texts = [Text(text, body.truncate, body.prompt_name, body.input_type) for text in given]

    async def work(following: Following | None) -> dict[str, Any]:
        with measured(model.name):
            found: Embeddings = await model.results(texts, caller, "input", following)
        vectors = shortened(found.vectors, body.dimensions)
        tokens = int(found.tokens.sum())
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
                for index, vector in enumerate(vectors)
            ],
            "model": model.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    return await respond(caller, work)


def _texts(given: Input, limits: Limits) -> list[str] | list[list[int]]:
    """One entry per vector. Raises a 400 for empty input, as OpenAI does."""
    texts: Any = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if texts and isinstance(texts[0], list):
        check_texts([""] * len(texts), "input", limits)
        too_long = next((number for number, ids in enumerate(texts) if len(ids) > limits.max_text_chars), None)
        if too_long is not None:
            raise errors.too_large(f"input.{too_long} has too many tokens", f"input.{too_long}")
    else:
        check_texts(texts, "input", limits)
    empty = next((number for number, text in enumerate(texts) if not text), None)
    if empty is not None:
        raise errors.invalid(f"input.{empty} is empty", f"input.{empty}" if len(texts) > 1 else "input")
    return texts  # type: ignore[no-any-return]


def shortened(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first `dimensions` of each vector, rescaled to length 1."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    if dimensions > vectors.shape[1]:
        raise errors.invalid(f"dimensions is {dimensions}, but the model has {vectors.shape[1]}", "dimensions")
    cut = vectors[:, :dimensions]
    return np.ascontiguousarray(cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12))


def _encoded(vector: np.ndarray, encoding: str) -> np.ndarray | str:
    """The vector itself, or base64 of its little-endian float32 bytes."""
    return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode() if encoding == "base64" else vector
