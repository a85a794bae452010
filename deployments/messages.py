"""Requests to each kind of model and its answers: the types that cross from `serve` to an engine and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Requests:
    """One call to a replica, carrying requests of many clients."""

    items: list[Any]
    timeouts_s: list[float]
    """Seconds within which each request must begin to run."""
    numbers: list[int]
    """Of each request: what its answer refers to it by. A later call takes requests back by number."""
    taken_back: list[int] = field(default_factory=list)
    """Numbers of requests in earlier calls that nobody waits for any more."""
    followed: list[int] = field(default_factory=list)
    """Numbers of the requests whose progress is to be reported."""
    backlog: int = 0
    """Items the caller still holds back."""
    caller: str = ""
    """Identifies the sending queue. Each process has one queue per model."""

    def one_by_one(self) -> Iterator[Requests]:
        """The same requests, each in a call of its own."""
        for item, timeout_s, number in zip(self.items, self.timeouts_s, self.numbers, strict=True):
            yield replace(self, items=[item], timeouts_s=[timeout_s], numbers=[number])


@dataclass(frozen=True)
class Prompt:
    """Predict the words that may follow `text`."""

    text: str
    top_k: int = 5
    temperature: float = 0.8
    complete_word: bool = True
    tenant: str = ""
    """Owner of the prompt. Tenants never share cached prefixes."""


@dataclass(frozen=True)
class Word:
    text: str
    """Without spaces."""
    append: str
    """Text to append to the input. A new word starts with a space, unless the input ends in one."""
    confidence: float
    """Product of the probabilities of the word's tokens. The temperature applies to the first token only."""


InputType = Literal["query", "document"]


@dataclass(frozen=True)
class Text:
    """A text, or its ids in the model's tokenizer. Cut to the model's length unless `truncate` is off."""

    text: str | list[int]
    truncate: bool = True
    prompt_name: str | None = None
    """Which of the model's prompts to put before the text."""
    input_type: InputType | None = None
    """Without `prompt_name`, selects the model's prompt for such texts. Without either, its default, as in `encode`."""


@dataclass(frozen=True)
class Embeddings:
    """Answer to a batch: one row per text."""

    vectors: np.ndarray
    """float32, shape (texts, dimensions)."""
    tokens: np.ndarray
    """int32, shape (texts,)."""


@dataclass(frozen=True)
class Pair:
    """Score how well `document` answers `query`."""

    query: str
    document: str
    truncate: bool = True


@dataclass(frozen=True)
class Scores:
    """Answer to a batch: one entry per pair."""

    logits: np.ndarray
    """float32, shape (pairs,): the model's raw outputs. Documents are ranked by them."""
    tokens: np.ndarray
    """int32, shape (pairs,)."""


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logits as scores from 0 to 1. float64, as in float32 every logit from 17 on would become 1."""
    small = np.exp(-np.abs(logits.astype(np.float64)))
    scores: np.ndarray = np.where(logits >= 0, 1, small) / (1 + small)
    return scores


MAX_ASPECT = 50
"""Longest side over shortest. A vision processor scales the shorter side up, so a thin image would take gigabytes."""


@dataclass(frozen=True)
class Question:
    """Ask `prompt` about an image."""

    image: bytes
    """An encoded image file, in one of `deployments.images.FORMATS`."""
    prompt: str
    schema: str
    """JSON schema that the answer has to match."""
    tenant: str = ""
    """As in `Prompt`."""


@dataclass(frozen=True)
class Answer:
    json: str
    tokens: int
    steps: int = 0
    """Passes of the model that the answer took."""
    forced: int = 0
    """Tokens for which the schema left no choice."""


TURN_BYTES = 256
"""Bytes of text per turn: about 64 tokens, in English (4 letters each) and in Korean (1 or 2 syllables of 3 bytes)."""
BYTES_PER_TOKEN = 4


def turns(request: Any, max_tokens: int | None) -> int:
    """The work of a request, in turns: 1, plus 1 for every `TURN_BYTES` of text.

    Text beyond what the model reads (`max_tokens`, if known) does not count.
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
"""Assumed limit of a model whose limit is not known yet."""


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


@dataclass(frozen=True)
class Answers:
    """One result per request, in order: a list or a dataclass of arrays. Rows of refused requests mean nothing."""

    results: Any
    refusals: dict[int, Refusal]
    """By the request's place in the call."""


TO_ANSWER_S = 1.0
"""How long before its deadline a streamed answer ends with what it has, so that it still reaches the client."""


@dataclass(frozen=True)
class ItemProgress:
    """Progress of an item that has no answer yet."""

    ahead: int | None = None
    """Items ahead of it, while it waits."""
    tokens: int | None = None
    """Tokens generated so far, while it runs."""
    delta: Any = None
    """What was generated since the last time, of an engine that streams."""


@dataclass(frozen=True)
class Piece:
    """Answers to some requests of a call, by the requests' numbers."""

    numbers: Sequence[int]
    """Of the requests that `results` are for, in that order."""
    results: Any
    refusals: dict[int, Refusal]
    progress: dict[int, ItemProgress] = field(default_factory=dict)
    """Progress of followed requests without an answer yet."""

    @property
    def answered(self) -> list[int]:
        """Numbers of the requests that this answers."""
        return [*self.numbers, *self.refusals]

    def __len__(self) -> int:
        return len(self.numbers) + len(self.refusals)


@dataclass(frozen=True)
class Refusal:
    """Stands for the result of an item that was refused or failed; the rest of its batch is unaffected."""

    reason: str
    kind: Literal["invalid", "too_large", "failed", "late", "lost", "busy"] = "invalid"
    field: str | None = None
    code: str | None = None
    """As in `ItemError`."""
    retry_after_s: float = 1.0
    """When to come back, if it is lost or the model is busy."""
