"""Counting what JSON holds without parsing it."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from serve.config.settings import Limits
from serve.errors import DureError
from serve.http import json_bounds
from serve.http.json_bounds import JsonBounds, check, checked

DRAW = random.Random(7)
TEXTS = ["", "a", 'say "hello"', "back\\slash", "\\", '\\"', "[{,:}]", "가나다", "😀", "a\nb", '","', "\\\\\\"]


def some_json(depth: int) -> Any:
    kind = DRAW.randrange(6 if depth else 4)
    if kind == 4:
        return [some_json(depth - 1) for _ in range(DRAW.randrange(6))]
    if kind == 5:
        return {f"{number}{DRAW.choice(TEXTS)}": some_json(depth - 1) for number in range(DRAW.randrange(6))}
    return DRAW.choice([None, True, 12, -0.5, *TEXTS])


def shape(value: Any) -> tuple[int, int, int]:
    """Commas, lists and objects with fields, and depth: found by looking at what was parsed."""
    if not isinstance(value, list | dict):
        return 0, 0, 0
    inner = [shape(each) for each in (value.values() if isinstance(value, dict) else value)]
    commas = max(0, len(value) - 1) + sum(each[0] for each in inner)
    fields = len(value) if isinstance(value, dict) else 0
    return commas, 1 + fields + sum(each[1] for each in inner), 1 + max((each[2] for each in inner), default=0)


@pytest.mark.parametrize("ascii", [True, False])
def test_counts_are_those_of_what_is_parsed(ascii: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_bounds, "PIECE_BYTES", 7)  # strings and escapes lie across pieces
    for _ in range(300):
        value = [some_json(6), [[]]]
        body = json.dumps(value, ensure_ascii=ascii).encode()
        values, structures, depth = shape(value)
        check(body, JsonBounds(values, structures, depth))
        for less in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
            bounds = JsonBounds(values - less[0], structures - less[1], depth - less[2])
            with pytest.raises(DureError):
                check(body, bounds)


BOUNDS = JsonBounds.of(Limits())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 101, 400),
        (b"[" * 100 + b"]" * 100, None),
        (b'{"a":' * 200 + b"1" + b"}" * 200, 400),
        (b"[" * 3_000_000, 400),
        (b'{"a":"' + b"[" * 3_000_000 + b'"}', None),
        (b'{"a":"' + b'\\"[' * 1_000_000 + b'"}', None),
        (b"[" + b"[1]," * 1_000_000 + b"1]", 413),
        (b"[" + b"1," * 2_000_000 + b"1]", 413),
        (b"{" + b",".join(b'"k%d":1' % number for number in range(200_000)) + b"}", 413),
        (json.dumps([[12345] * 511] * 2048).encode(), None),
        (json.dumps([{"text": "a, b: [c]" * 100, "n": {"id": 1}}] * 2048).encode(), None),
        (json.dumps(["계약, 보증금: " * 1000] * 1500, ensure_ascii=False).encode(), None),
        (b"\\" * 1_000_001, None),
    ],
)
def test_bodies_are_bounded_and_those_at_the_limits_pass(body: bytes, status: int | None) -> None:
    if status is None:
        check(body, BOUNDS)
        return
    with pytest.raises(DureError) as caught:
        check(body, BOUNDS)
    assert caught.value.status == status


@pytest.mark.parametrize("length", [1, 30_000, 500_000])
def test_text_of_another_encoding_is_told_so(length: int) -> None:
    text = json.dumps(["보증금" * length], ensure_ascii=False)
    assert asyncio.run(checked(text.encode(), BOUNDS)) == text.encode()
    assert asyncio.run(checked(text.encode("utf-8-sig"), BOUNDS)) == text.encode()
    for encoding in ("cp949", "utf-16", "johab"):
        with pytest.raises(DureError, match="UTF-8") as caught:
            asyncio.run(checked(text.encode(encoding), BOUNDS))
        assert caught.value.status == 400


def test_a_character_across_pieces_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_bounds, "PIECE_BYTES", 2)
    check('["가😀"]'.encode(), BOUNDS)
    with pytest.raises(DureError, match="UTF-8"):
        check('["가'.encode()[:-1], BOUNDS)
