"""Token ids of one text or pair of texts, and their padding to a batch."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from deployments.spec import ItemError


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids of one item, and their segments where the model tells two texts apart: int64, shape (tokens,)."""

    ids: np.ndarray
    segments: np.ndarray | None = None


class Encoder:
    """Encodes texts for one model in any number of threads, with the ids that its tokenizer gives.

    It calls a copy of the Rust tokenizer and does the rest itself. transformers sets truncation anew on every call, on
    a tokenizer that all threads share, and Rust's truncation of a pair builds all combinations of the parts that it
    cuts off: two texts of 100,000 letters take gigabytes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._from_left = tokenizer.truncation_side == "left"
        self._segments = "token_type_ids" in tokenizer.model_input_names
        self._slow = threading.Lock()
        self._rust = _private_copy(tokenizer)
        self._frames = None if self._rust is None else (_frame(self._rust, "a"), _frame(self._rust, ("a", "a")))

    def encode(self, text: str, pair: str | None = None, truncate: bool = True) -> Encoded:
        """Ids with the model's special tokens, cut to `max_tokens` from the end of the longer text.

        Raises ItemError where `truncate` is off and the text is longer.
        """
        if self._rust is None or self._frames is None:
            with self._slow:
                return encode_one(self.tokenizer, text, self.max_tokens, truncate, pair)
        texts = [text, pair] if pair else [text]
        frame = self._frames[len(texts) - 1]
        found = self._rust.encode_batch_fast(texts, add_special_tokens=False)  # without the interpreter lock
        parts = [each.ids for each in found]
        room = self.max_tokens - frame.specials
        total = sum(map(len, parts))
        if total > room:
            if not truncate:
                raise _too_long(total + frame.specials, self.max_tokens)
            parts = [self._cut(part, size) for part, size in zip(parts, _longest_first(parts, room), strict=True)]
        return frame.around(parts, self._segments)

    def _cut(self, part: list[int], size: int) -> list[int]:
        return part[len(part) - size :] if self._from_left else part[:size]


@dataclass(frozen=True)
class Frame:
    """The special tokens before, between and after texts, and the segment of each place: gaps and texts in turn."""

    gaps: list[list[int]]
    gap_segments: list[list[int]]
    text_segments: list[int]

    @property
    def specials(self) -> int:
        return sum(map(len, self.gaps))

    def around(self, parts: list[list[int]], segments: bool) -> Encoded:
        ids, places = list(self.gaps[0]), list(self.gap_segments[0])
        for part, gap, gap_segments, segment in zip(
            parts, self.gaps[1:], self.gap_segments[1:], self.text_segments, strict=True
        ):
            ids += part + gap
            places += [segment] * len(part) + gap_segments
        return Encoded(np.array(ids, np.int64), np.array(places, np.int64) if segments else None)


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


def _longest_first(parts: list[list[int]], room: int) -> list[int]:
    """How much of each text fits: of two, the longer gives way first, as in tokenizers' truncation."""
    if len(parts) == 1:
        return [room]
    short, long = sorted(map(len, parts))
    short, long = (short, room - short) if short <= room - short else (room // 2, room - room // 2)
    return [short, long] if len(parts[0]) <= len(parts[1]) else [long, short]


def _private_copy(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer's Rust half, cutting and padding nothing; None where it has none."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(rust, Tokenizer):
        return None
    copy = Tokenizer.from_str(rust.to_str())
    copy.no_padding()
    copy.no_truncation()
    copy.encode_special_tokens = tokenizer.split_special_tokens
    return copy


def _too_long(tokens: int, limit: int) -> ItemError:
    return ItemError(f"{tokens} tokens are more than the model's {limit}; shorten it or allow truncation")


def encode_one(
    tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int, truncate: bool = True, pair: str | None = None
) -> Encoded:
    """The same through transformers, for one thread at a time."""
    strategy = "longest_first" if truncate else False
    encoded = tokenizer(text, pair, truncation=strategy, max_length=max_tokens if truncate else None, verbose=False)
    ids = np.array(encoded["input_ids"], np.int64)
    if len(ids) > max_tokens:
        raise _too_long(len(ids), max_tokens)
    segments = encoded.get("token_type_ids")
    return Encoded(ids, None if segments is None else np.array(segments, np.int64))


def pad(items: list[Encoded], tokenizer: PreTrainedTokenizerBase, device: torch.device) -> dict[str, torch.Tensor]:
    """Model inputs of shape (items, longest), padded on the right."""
    rows = pad_rows(items, tokenizer.pad_token_id or 0, "token_type_ids" in tokenizer.model_input_names)
    return {name: torch.from_numpy(array).to(device) for name, array in rows.items()}


def pad_rows(items: list[Encoded], pad_id: int, segments: bool) -> dict[str, np.ndarray]:
    """Model inputs as int64 arrays of shape (items, longest), padded on the right."""
    lengths = np.fromiter((len(item.ids) for item in items), np.int64, len(items))
    mask = np.arange(lengths.max()) < lengths[:, None]
    rows = {"input_ids": np.full(mask.shape, pad_id, np.int64), "attention_mask": mask.astype(np.int64)}
    rows["input_ids"][mask] = np.concatenate([item.ids for item in items])
    if segments or items[0].segments is not None:
        rows["token_type_ids"] = np.zeros(mask.shape, np.int64)
        for row, item in zip(rows["token_type_ids"], items, strict=True):
            if item.segments is not None:
                row[: len(item.segments)] = item.segments
    return rows
