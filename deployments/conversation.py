"""Requests to a chat model and its answers: the types that cross from `serve` to the engine and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. None: as the checkpoint's generation_config.json says, else as noted."""

    temperature: float | None = None
    """0: always the likeliest token. 1 by default."""
    top_p: float | None = None
    """1 by default."""
    top_k: int | None = None
    """0, the default: no bound."""
    min_p: float | None = None
    """Least probability, as a fraction of the likeliest token's. 0 by default."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    """Both count the tokens of the answer, as OpenAI's do."""
    repetition_penalty: float | None = None
    """Counts the tokens of the prompt, too: https://arxiv.org/abs/1909.05858. 1 by default."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """None: drawn at random."""
    top_logprobs: int | None = None
    """Likeliest tokens to report with each token; None: no probabilities are reported."""


@dataclass(frozen=True)
class ChatRequest:
    """Answer a conversation, or continue a text."""

    messages: list[dict[str, Any]] | None = None
    """In OpenAI's form, with texts as contents and objects as arguments of tool calls. None: continue `prompt`."""
    prompt: str | list[int] = ""
    """A text, or its ids in the model's tokenizer, which no template changes."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str = "auto"
    """`auto`, `none`, `required`, or `=` and the name of a tool."""
    schema: str | None = None
    """JSON schema that the answer has to match."""
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    """Most tokens of the answer. None: as many as the model has room for."""
    stops: tuple[str, ...] = ()
    """Texts that end the answer. They are not part of it."""
    ignore_eos: bool = False
    """Write on until `max_tokens`."""
    parallel_calls: bool = True
    """Whether an answer may have several calls."""
    tenant: str = ""
    """Tenants never share what was read of their prompts."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token's probability in the model's own distribution: before temperature, penalties, bias and grammar."""

    token: str
    logprob: float
    raw: bytes
    """The bytes that the token stands for, which may be a part of a character."""
    top: tuple[tuple[str, float, bytes], ...] = ()
    """The likeliest tokens in its place."""


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: str
    """JSON."""


@dataclass(frozen=True)
class TextPiece:
    """What one step added to an answer."""

    text: str = ""
    """Whole characters."""
    call: ToolCall | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Delta:
    """New pieces of an answer under way, and some before them, in case an earlier delta was lost."""

    first: int
    """Number of the first of `pieces`, among all of the answer's."""
    pieces: tuple[TextPiece, ...]


@dataclass(frozen=True)
class Reply:
    """A complete answer."""

    pieces: tuple[TextPiece, ...]
    finish: Finish
    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt that had been read before."""
    tokens: int
    forced: int = 0
    """Tokens for which the grammar left no choice."""
    prompt_seconds: float = 0.0
    """Time until the first token."""
    seconds: float = 0.0
    """Time for all tokens after the first."""

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def calls(self) -> list[ToolCall]:
        return [piece.call for piece in self.pieces if piece.call]
