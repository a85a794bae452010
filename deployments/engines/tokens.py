"""Turns a text or a pair of texts into token ids, cut the way the model's tokenizer cuts them."""

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
"""Characters per token of the model's limit, more than most texts need. Longer texts are tokenised in parts."""
SPARE = 32
"""Tokens beyond the limit that a part must have, as its last tokens may differ where it was cut off."""


@dataclass(frozen=True)
class Part:
    """The token ids of a text, or of as much of it as the model can take."""

    ids: list[int]
    whole: bool


class TextTokenizer:
    """Encodes texts for one model, in any number of threads, with the same ids as the model's tokenizer.

    Truncation is done here for two reasons. transformers sets it on every call, on a tokenizer that all threads share.
    And truncating pairs in Rust builds all combinations of the parts that are cut off, which takes gigabytes for two
    texts of 100,000 letters. Only as much of a long text is tokenised as the limit can need.
    """

    def __init__(self, rust: Tokenizer, spec: InputSpec) -> None:
        """`rust` must neither truncate nor pad."""
        self.rust = rust
        self.spec = spec
        self._frames = (_frame(rust, "a"), _frame(rust, ("a", "a")))
        self._last = threading.local()
        """Per thread, the last first text of a pair and its part: the pairs of a request share their query."""

    def encode(self, text: str, pair: str | None = None, truncate: bool = True) -> Encoded:
        """Ids with the model's special tokens. Beyond the model's limit, the longer text is cut at its end.

        Raises ItemError if `truncate` is off and the text is too long, and for a token that the model does not know.
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

    def fewest(self, texts: int) -> int:
        """Tokens of the shortest item of one or two texts: the special tokens, and one of each text."""
        return self._frames[texts - 1].specials + texts

    def part(self, text: str) -> Part:
        """All ids of a text, or one more of its first (or last) ids than the model takes.

        A part of a long text suffices if it ends between two words, or if a part twice as long has the same first ids.
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
        """Enough of a text to exceed the model's limit, or all of it."""
        for size in self._sizes(text):
            part, _ = self._split(text, size)
            if len(self._ids(part)) >= self.spec.max_tokens + SPARE:
                return part
        return text

    def _sizes(self, text: str) -> Sequence[int]:
        """Lengths in characters of the parts to try; none if the text is short."""
        first = FIRST_CHARS * self.spec.max_tokens + SPARE
        return list(itertools.takewhile(lambda size: size < len(text), (first << times for times in range(32))))

    def _split(self, text: str, size: int) -> tuple[str, bool]:
        """The first (or last) `size` characters of a text, and whether the cut lies between two words."""
        if self.spec.cuts_left:
            part = text[-size:]
            at = part.find(" ", 0, size // 4)
            return (part[at:], True) if at >= 0 else (part, False)
        part = text[:size]
        at = part.rfind(" ", size - size // 4)
        return (part[:at], True) if at >= 0 else (part, False)

    def _ids(self, text: str) -> list[int]:
        [found] = self.rust.encode_batch_fast([text], add_special_tokens=False)  # releases the GIL
        ids: list[int] = found.ids
        return ids

    def _cut(self, ids: list[int], size: int) -> list[int]:
        return ids[len(ids) - size :] if self.spec.cuts_left else ids[:size]

    def _longest_first(self, texts: list[str], parts: list[Part], room: int) -> list[int]:
        """Tokens left of each of two texts: the longer one is cut first, as in tokenizers' `longest_first`."""
        lengths = [len(part.ids) for part in parts]
        half = room // 2
        if min(lengths) > half and room % 2 and not all(part.whole for part in parts):
            lengths = [len(self._ids(text)) for text in texts]  # the longer text gets the odd token
        short = min(*lengths, half)
        return [short, room - short] if lengths[0] <= lengths[1] else [room - short, short]


@dataclass(frozen=True)
class Frame:
    """The special tokens before, between and after texts, with the segments of the gaps and of the texts."""

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
    """The frame that a tokenizer puts around two texts."""
    return _frame(rust, ("a", "a"))


def too_long(limit: int) -> ItemError:
    return ItemError(f"it has more than the {limit} tokens that the model takes; shorten it or allow truncation")


def _frame(rust: Tokenizer, texts: str | tuple[str, str]) -> Frame:
    """The frame that the tokenizer puts around texts, learnt by encoding short ones."""
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
