"""What each kind of model is asked and what it answers: the types that cross from `serve` to an engine and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Requests:
    """Requests of many clients that go to a replica as one call."""

    items: list[Any]
    timeouts_s: list[float]
    """Of each, in which it has to have begun."""
    numbers: list[int]
    """Of each, by which a later call may take it back."""
    taken_back: list[int] = field(default_factory=list)
    """Numbers of requests in calls under way that nobody waits for any more."""
    followed: list[int] = field(default_factory=list)
    """Numbers of those of which it is to be told how far they are."""
    backlog: int = 0
    """How many more the caller holds back."""
    caller: str = ""
    """Who that is: one of the queues that send to the model, of which a process has one."""


@dataclass(frozen=True)
class Prompt:
    """Which words may follow `text`?"""

    text: str
    top_k: int = 5
    temperature: float = 0.8
    complete_word: bool = True
    tenant: str = ""
    """Whose it is: what was read for one tenant's prompts is not used for another's."""


@dataclass(frozen=True)
class Word:
    text: str
    """Without spaces."""
    append: str
    """What to append to the input: with the space before a new word, unless the input ends in one."""
    confidence: float
    """Product of the probabilities of the word's tokens, the first at the temperature."""


InputType = Literal["query", "document"]


@dataclass(frozen=True)
class Text:
    """A text, or the ids of one in the model's own tokenizer; cut at the model's length unless `truncate` is off."""

    text: str | list[int]
    truncate: bool = True
    prompt_name: str | None = None
    """Of the model's own prompts that which comes before the text."""
    input_type: InputType | None = None
    """Without a `prompt_name`: the model's prompt for such texts; without either its default, as for `encode`."""


@dataclass(frozen=True)
class Embeddings:
    """A batch's answer, a row for each text."""

    vectors: np.ndarray
    """float32, shape (texts, dimensions)."""
    tokens: np.ndarray
    """int32, shape (texts,)."""


@dataclass(frozen=True)
class Pair:
    """How well does `document` answer `query`?"""

    query: str
    document: str
    truncate: bool = True


@dataclass(frozen=True)
class Scores:
    """A batch's answer, an entry for each pair."""

    logits: np.ndarray
    """float32, shape (pairs,): the model's own, by which documents are put in order."""
    tokens: np.ndarray
    """int32, shape (pairs,)."""


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logits as scores from 0 to 1, float64: in float32 all from 17 on would be 1."""
    small = np.exp(-np.abs(logits.astype(np.float64)))
    scores: np.ndarray = np.where(logits >= 0, 1, small) / (1 + small)
    return scores


MAX_ASPECT = 50
"""A vision model's processor first scales an image's shorter side up; a thin line would become gigabytes."""


@dataclass(frozen=True)
class Question:
    """What does `prompt` make of the image?"""

    image: bytes
    """An encoded file, in one of `deployments.images.FORMATS`."""
    prompt: str
    schema: str
    """JSON schema that the answer obeys."""
    tenant: str = ""
    """As of a `Prompt`."""


@dataclass(frozen=True)
class Answer:
    json: str
    tokens: int
    steps: int = 0
    """Passes of the model that it took."""
    forced: int = 0
    """Of the tokens, those that the schema left no choice about."""


TURN_BYTES = 256
"""Of text, for a turn: about 64 tokens, in English (4 letters each) as in Korean (1 or 2 syllables, 3 bytes each)."""
BYTES_PER_TOKEN = 4


def turns(request: Any, max_tokens: int | None) -> int:
    """How much work a request is, in turns: one for a short text, or for what has no text, and more for long ones.

    No more of a text counts than the model reads (`max_tokens`, where that is known).
    """
    match request:
        case Text(text=list() as ids):
            size = BYTES_PER_TOKEN * len(ids)
        case Text(text=str() as text):
            size = _bytes(text)
        case Pair():
            size = _bytes(request.query) + _bytes(request.document)
        case _:
            return 1
    return 1 + min(size, BYTES_PER_TOKEN * (max_tokens or LIKELY_TOKENS)) // TURN_BYTES


LIKELY_TOKENS = 512
"""That a model reads of which nothing is known yet."""


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


@dataclass(frozen=True)
class Answers:
    """One result per request, in order: a list, or a dataclass of arrays; a refused request's place means nothing."""

    results: Any
    refusals: dict[int, Refusal]
    """By the request's place."""


@dataclass(frozen=True)
class News:
    """How far an item is that has no answer yet."""

    ahead: int | None = None
    """Items before it, while it waits."""
    tokens: int | None = None
    """Written so far, while it runs."""


@dataclass(frozen=True)
class Piece:
    """Answers to some of the requests of a call: results for those at `places`, in that order."""

    places: Sequence[int]
    results: Any
    refusals: dict[int, Refusal]
    """By the request's place."""
    news: dict[int, News] = field(default_factory=dict)
    """Of requests that are followed and have no answer yet, by place."""

    def __len__(self) -> int:
        return len(self.places) + len(self.refusals)


@dataclass(frozen=True)
class Refusal:
    """Stands in the place of the result of an item that was refused or that failed, so that its neighbours live."""

    reason: str
    kind: Literal["invalid", "too_large", "failed", "late"] = "invalid"
    field: str | None = None
