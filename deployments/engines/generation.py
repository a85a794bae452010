"""One answer of a chat model while it is written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llguidance import LLMatcher

from deployments.conversation import ChatRequest, Delta, Finish, Reply, Sampling, TextPiece, TokenLogprob
from deployments.engines.answer_text import AnswerText
from deployments.engines.chat_template import CallFormat
from deployments.engines.grammar import CLOSE_FROM
from deployments.engines.sampling import Choice, Draws
from deployments.engines.sequences import Sequence as Read
from deployments.engines.tool_calls import CallParser
from deployments.messages import Refusal

REPEATED = 4
"""Pieces before the new ones that a delta repeats, so that a lost delta does no harm."""


@dataclass(frozen=True)
class ChatItem:
    """A request, ready to be answered."""

    ids: list[int]
    """The prompt."""
    request: ChatRequest
    sampling: Sampling
    max_tokens: int
    matcher: LLMatcher | None
    """The answer's grammar, as yet unused; None: free text."""
    closes: bool
    """The answer is one JSON value, to be closed when it nears its limit."""
    call_format: CallFormat
    """How calls in its text are found; `none`: they are not looked for."""


class Generation:
    """The work on one item."""

    def __init__(
        self,
        item: ChatItem,
        ends: frozenset[int],
        decode: Callable[[Sequence[int]], str],
        to_bytes: Callable[[list[int]], bytes],
        room: Callable[[], int],
    ) -> None:
        """`ends` are the tokens that end an answer, `room` is how much of a prompt the next step may read.

        `decode` and `to_bytes` turn tokens into text and into the bytes that they stand for.
        """
        self.item = item
        self.ends = ends
        self.decode = decode
        self.to_bytes = to_bytes
        self.room = room
        self.deadline = math.inf
        """When the answer ends with what it has (time.monotonic)."""
        self.sequence: Read | None = None
        """What has been read; None: nothing yet, or it was dropped to make room for others."""
        self.to_read = list(item.ids)
        self.is_prompt = True
        """More than the last written tokens are to be read."""
        self.tokens: list[int] = []
        """Written so far, without the one that ended the answer."""
        self.forced = 0
        self.cached: int | None = None
        """Tokens of the prompt that had been read before; None: not known yet."""
        self.draws = Draws(item.sampling, item.ids)
        self.matcher = item.matcher.deep_copy() if item.matcher else None
        self.text = AnswerText(decode, item.request.stops)
        self.calls = CallParser(item.call_format, [tool["function"]["name"] for tool in item.request.tools])
        self.pieces: list[TextPiece] = []
        self._logprobs: tuple[TokenLogprob, ...] = ()
        """Of tokens whose text may yet be part of a stop string."""
        self._sent = 0
        self.started = time.monotonic()
        self.first_at = 0.0
        self.result: Reply | Refusal | None = None

    @property
    def cost(self) -> int:
        """Tokens that the next step reads."""
        return min(len(self.to_read), self.room()) if self.is_prompt else len(self.to_read)

    @property
    def written(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.item.ids) + len(self.tokens)

    @property
    def should_close(self) -> bool:
        return self.item.closes and len(self.tokens) >= CLOSE_FROM * self.item.max_tokens

    def put_off(self) -> None:
        """Drop what was read, to read it again later."""
        self.sequence = None
        self.to_read = [*self.item.ids, *self.tokens]
        self.is_prompt = True

    def has_read(self, tokens: int) -> None:
        assert self.sequence
        self.sequence.length += tokens
        del self.to_read[:tokens]
        self.is_prompt = self.is_prompt and bool(self.to_read)

    def end_by(self, deadline: float) -> None:
        """End the answer with what it has at this time (time.monotonic)."""
        self.deadline = deadline

    def write(self, choice: Choice) -> None:
        """Append the token that was chosen, and the tokens that must follow it."""
        self.first_at = self.first_at or time.monotonic()
        token, room = choice.token, self.item.max_tokens - len(self.tokens)
        if self.matcher:
            self.matcher.consume_token(token)
            if self._has_left_grammar():
                return
        if token in self.ends and not self.item.request.ignore_eos:
            self._finish("stop")
            return
        new, ended, cut = [token], False, False
        if self.matcher:
            forced = [] if self.matcher.is_stopped() or choice.logprob is not None else self.matcher.compute_ff_tokens()
            cut = len(forced) >= room
            forced = forced[: room - 1]
            self.matcher.consume_tokens(forced)
            ended = self.matcher.is_stopped() and not cut
            new += [each for each in forced if each not in self.ends]
            self.forced += len(new) - 1
            if self._has_left_grammar():
                return
        self.tokens += new
        self.to_read = [*self.to_read, *new]
        self.draws.wrote(new)
        self._give_out(self.text.add(new), self._reported(choice))
        one_call = self.calls.found and not self.item.request.parallel_calls
        if self.text.stopped_at is not None or ended or one_call:
            self._finish("stop")
        elif len(self.tokens) >= self.item.max_tokens:
            self._finish("length")

    def _has_left_grammar(self) -> bool:
        """Whether the grammar has failed, for example because it became too large. The answer is refused then."""
        if not self.matcher or not self.matcher.is_error():
            return False
        self.result = Refusal(f"the answer left its grammar: {self.matcher.get_error()}", "failed")
        return True

    def check_time(self) -> None:
        """End the answer with what it has, if its time is over."""
        if self.result is None and time.monotonic() > self.deadline:
            self._finish("length")

    def take_delta(self) -> Delta | None:
        """What was written since the last time."""
        if self._sent == len(self.pieces):
            return None
        first = max(0, self._sent - REPEATED)
        self._sent = len(self.pieces)
        return Delta(first, tuple(self.pieces[first:]))

    def _give_out(self, text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        """Add pieces for text that is surely no stop string, with the probabilities of its tokens."""
        pieces = self.calls.add(text) if text else []
        self._logprobs += logprobs
        if self._logprobs and not self.text.holds and self.text.stopped_at is None:
            first = pieces[0] if pieces else TextPiece()
            pieces[:1] = [TextPiece(first.text, first.call, self._logprobs)]
            self._logprobs = ()
        self.pieces += pieces

    def _finish(self, finish: Finish) -> None:
        self._give_out(self.text.end())
        self.pieces += self.calls.end()
        now = time.monotonic()
        first_at = self.first_at or now
        self.result = Reply(
            tuple(self.pieces),
            "tool_calls" if self.calls.found else finish,
            len(self.item.ids),
            self.cached or 0,
            len(self.tokens),
            self.forced,
            first_at - self.started,
            now - first_at,
        )

    def _reported(self, choice: Choice) -> tuple[TokenLogprob, ...]:
        if choice.logprob is None:
            return ()
        top = tuple((self.decode([token]), logprob, self.to_bytes([token])) for token, logprob in choice.top)
        return (TokenLogprob(self.decode([choice.token]), choice.logprob, self.to_bytes([choice.token]), top),)
