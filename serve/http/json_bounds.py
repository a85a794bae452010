"""Bounds on a JSON body, checked before it is parsed.

A parser holds the interpreter lock until it is done, even in a thread: 22 MB of `[[1],[1],...]` took 3 s and 1.3 GB.
So a body's values are counted first, without creating any of them.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from serve import errors
from serve.config.settings import Limits

MAX_DEPTH = 100
"""Half of what pydantic's parser accepts, and a tenth of what Python's does."""
VALUES_PER_ITEM = 512
"""JSON values allowed per list item: the number of token ids that an encoder reads."""
STRUCTURES_PER_ITEM = 64
"""Lists, objects and fields allowed per list item. Each costs as much as ten plain values."""
INLINE_BYTES = 64 * 1024
"""Bodies up to this size are checked inline; longer ones in a thread, piece by piece, so that other tasks can run."""
PIECE_BYTES = 256 * 1024
QUOTE, COMMA, COLON = b'",:'
OPENING, CLOSING = np.frombuffer(b"[{", np.uint8), np.frombuffer(b"]}", np.uint8)
LOWER = 0x20
"""The bit that distinguishes braces from brackets."""


@dataclass(frozen=True)
class JsonBounds:
    values: int
    structures: int
    """Lists, objects and their fields."""
    depth: int = MAX_DEPTH

    @classmethod
    def of(cls, limits: Limits) -> JsonBounds:
        return cls(VALUES_PER_ITEM * limits.max_list_items, STRUCTURES_PER_ITEM * limits.max_list_items)


async def checked(body: bytes, bounds: JsonBounds) -> bytes:
    """The body without a UTF-8 byte order mark. Raises a DureError if it must not be parsed."""
    body = body.removeprefix(codecs.BOM_UTF8)
    if len(body) <= INLINE_BYTES:
        check(body, bounds)
    else:
        await asyncio.to_thread(check, body, bounds)
    return body


def check(body: bytes, bounds: JsonBounds) -> None:
    """Raises a DureError if the body is not UTF-8, has more values than `bounds` allow, or is nested deeper."""
    if not body.isascii():
        _check_utf8(body)
    if len(body) <= min(bounds.values, bounds.structures) and body.count(b"[") + body.count(b"{") <= bounds.depth:
        return  # a short body can't exceed the bounds, whatever it holds
    values = structures = deepest = depth = 0
    for marks in _marks(body):
        opens, closes = np.isin(marks, OPENING), np.isin(marks, CLOSING)
        depths = depth + np.cumsum(opens.astype(np.int64) - closes)
        values += int(np.count_nonzero(marks == COMMA))
        structures += int(np.count_nonzero(marks == COLON) + np.count_nonzero(opens))
        deepest = max(deepest, int(depths.max(initial=0)))
        depth = int(depths[-1]) if len(depths) else depth
        if deepest > bounds.depth:
            raise errors.invalid(f"the body is JSON nested more than {bounds.depth} deep")
        if values > bounds.values:
            raise errors.too_large(f"the body has more than {bounds.values} JSON values; send several requests")
        if structures > bounds.structures:
            raise errors.too_large(
                f"the body has more than {bounds.structures} JSON lists, objects and fields; send several requests"
            )


def _check_utf8(body: bytes) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(body), PIECE_BYTES):
            decoder.decode(body[start : start + PIECE_BYTES])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise errors.invalid("the body is not UTF-8; encode JSON as UTF-8") from error


def _marks(body: bytes) -> Iterator[np.ndarray]:
    """The commas, colons, brackets and braces outside strings, in order, piece by piece."""
    inside = 0
    for piece in _pieces(body):
        if b"\\" in piece:  # pairs first: after an even number of backslashes a quote is not escaped
            piece = piece.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
        characters = np.frombuffer(piece, np.uint8)
        quotes = np.flatnonzero(characters == QUOTE)
        lowered = characters | LOWER
        is_mark = (characters == COMMA) | (characters == COLON) | (lowered == OPENING[1]) | (lowered == CLOSING[1])
        marks = np.flatnonzero(is_mark)
        outside = marks[(np.searchsorted(quotes, marks) + inside) % 2 == 0]
        inside = (inside + len(quotes)) % 2
        yield characters[outside]


def _pieces(body: bytes) -> Iterator[bytes]:
    """Splits the body so that no piece ends between a backslash and the character it escapes."""
    start = 0
    while start < len(body):
        piece = body[start : start + PIECE_BYTES]
        if start + PIECE_BYTES < len(body) and (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece = piece[:-1]
        yield piece
        start += len(piece)
