"""Token ids of a text or a pair of texts, as its model's tokenizer makes and cuts them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from deployments.engines.inputs import Encoded, InputSpec
from deployments.spec import ItemError

FIRST_CHARS = 8
"""For each token that a model takes: more than a token has in most texts. What is longer is tokenised in parts."""
SPARE = 32
"""Tokens beyond the limit that a part has to have: where it was cut off, its last ones may differ."""


@dataclass(frozen=True)
class Part:
    """The token ids of a text, or of so much of it as its model can take."""

    ids: list[int]
    whole: bool


class TextTokenizer:
    """Encodes texts for one model in any number of threads, with the ids that its tokenizer gives.

    Truncation is done here: transformers sets it anew on every call on a tokenizer that all threads share, and that of
    pairs in Rust builds all combinations of the parts that it cuts off, gigabytes for two texts of 100,000 letters. Of
    a long text no more is tokenised than the limit can need.
    """

    def __init__(self, rust: Tokenizer, spec: InputSpec) -> None:
        """`rust` cuts and pads nothing."""
        self.rust = rust
        self.spec = spec
        self._frames = (_frame(rust, "a"), _frame(rust, ("a", "a")))
        self._last = threading.local()
        """Of each thread: the last text of a pair and its part. The pairs of a request share their query."""

    def encode(self, text: str, pair: str | None = None, truncate: bool = True) -> Encoded:
        """Ids with the model's special tokens, cut to its limit from the end of the longer text.

        Raises ItemError where `truncate` is off and the text is longer, and for a token that the model does not know.
        """
        texts = [text] if pair is None else [text, pair]
        frame = self._frames[len(texts) - 1]
        room = self.spec.max_tokens - frame.specials
        parts = [self.part(text)] if pair is None else [self._shared_part(text), self.part(pair)]
        if sum(len(part.ids) for part in parts) > room:
            if not truncate:
                raise too_long(self.spec.max_tokens)
            sizes = [room] if pair is None else self._longest_first(texts, parts, room)
            parts = [Part(self._cut(part.ids, size), False) for part, size in zip(parts, sizes, strict=True)]
        encoded = frame.around([part.ids for part in parts], self.spec.segments)
        return self.spec.checked(encoded, self.rust.id_to_token)

    def part(self, text: str) -> Part:
        """A text's ids, or more of its first (or last) ones than the model takes.

        A part of a long text will do if it ends between two words, or if one of twice its length begins alike.
        """
        limit = self.spec.max_tokens
        before: list[int] = []
        for size in self._sizes(text):
            part, between_words = self._split(text, size)
            ids = self._ids(part)
            if len(ids) >= limit + SPARE:
                kept = self._cut(ids, limit + 1)
                if between_words or kept == before:
                    return Part(kept, False)
                before = kept
        return Part(self._ids(text), True)

    def _shared_part(self, text: str) -> Part:
        if getattr(self._last, "text", None) is not text:
            self._last.text, self._last.part = text, self.part(text)
        part: Part = self._last.part
        return part

    def shortened(self, text: str) -> str:
        """So much of a text that it makes more tokens than the model takes, where the text does."""
        for size in self._sizes(text):
            part, _ = self._split(text, size)
            if len(self._ids(part)) >= self.spec.max_tokens + SPARE:
                return part
        return text

    def _sizes(self, text: str) -> Sequence[int]:
        """Characters of the parts of a text to try, if it is so long that a part may do."""
        first = FIRST_CHARS * self.spec.max_tokens + SPARE
        return list(itertools.takewhile(lambda size: size < len(text), (first << times for times in range(32))))

    def _split(self, text: str, size: int) -> tuple[str, bool]:
        """The first (or last) characters of a text, and whether the rest begins with another word."""
        if self.spec.cuts_left:
            part = text[-size:]
            at = part.find(" ", 0, size // 4)
            return (part[at:], True) if at >= 0 else (part, False)
        part = text[:size]
        at = part.rfind(" ", size - size // 4)
        return (part[:at], True) if at >= 0 else (part, False)

    def _ids(self, text: str) -> list[int]:
        [found] = self.rust.encode_batch_fast([text], add_special_tokens=False)  # without the interpreter lock
        ids: list[int] = found.ids
        return ids

    def _cut(self, ids: list[int], size: int) -> list[int]:
        return ids[len(ids) - size :] if self.spec.cuts_left else ids[:size]

    def _longest_first(self, texts: list[str], parts: list[Part], room: int) -> list[int]:
        """How much of each of two texts fits: the longer gives way first, as in tokenizers' truncation."""
        lengths = [len(part.ids) for part in parts]
        half = room // 2
        if min(lengths) > half and room % 2 and not all(part.whole for part in parts):
            lengths = [len(self._ids(text)) for text in texts]  # the longer one has the odd token
        short = min(*lengths, half)
        return [short, room - short] if lengths[0] <= lengths[1] else [room - short, short]


@dataclass(frozen=True)
class Frame:
    """The special tokens before, between and after texts, and the segment of each place: gaps and texts in turn."""

    gaps: list[list[int]]
    gap_segments: list[list[int]]
    text_segments: list[int]

    @property
    def specials(self) -> int:
        return sum(map(len, self.gaps))

    @property
    def highest_segment(self) -> int:
        return max((*self.text_segments, *itertools.chain(*self.gap_segments)), default=0)

    def around(self, parts: list[list[int]], segments: bool) -> Encoded:
        ids, places = list(self.gaps[0]), list(self.gap_segments[0])
        for part, gap, gap_segments, segment in zip(
            parts, self.gaps[1:], self.gap_segments[1:], self.text_segments, strict=True
        ):
            ids += part + gap
            places += [segment] * len(part) + gap_segments
        return Encoded(np.array(ids, np.int64), np.array(places, np.int64) if segments else None)


def frame_of_pairs(rust: Tokenizer) -> Frame:
    """What a tokenizer puts around two texts."""
    return _frame(rust, ("a", "a"))


def too_long(limit: int) -> ItemError:
    return ItemError(f"it has more than the {limit} tokens that the model takes; shorten it or allow truncation")


def _frame(rust: Tokenizer, texts: str | tuple[str, str]) -> Frame:
    """What the tokenizer puts around texts, learnt from what it does with short ones."""
    encoding = rust.encode(*([texts] if isinstance(texts, str) else texts))
    frame = Frame([[]], [[]], [])
    before = None
    for id, segment, sequence in zip(encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True):
        if sequence is None:
            frame.gaps[-1].append(id)
            frame.gap_segments[-1].append(segment)
        elif sequence != before:
            before = sequence
            frame.gaps.append([])
            frame.gap_segments.append([])
            frame.text_segments.append(segment)
    return frame
