"""Text of tokens as they come."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from deployments.engines.answer_text import AnswerText
from tests.checkpoints import byte_level

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=byte_level("<end>"))


def pieces(text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], AnswerText]:
    """What is given out after each token of the text, and at the end."""
    answer = AnswerText(lambda ids: str(TOKENIZER.decode(ids, skip_special_tokens=True)), stops)
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return [*(answer.add([id]) for id in ids), answer.end()], answer


@pytest.mark.parametrize(
    "text", ["오늘 날씨가 좋아요 🦊👩‍👩‍👧 café", "It's fine. STOP here", "  lead", "中文字", "a\n\nb"]
)
def test_pieces_are_whole_characters_and_make_the_text(text: str) -> None:
    given, _ = pieces(text)
    assert "".join(given) == text
    assert all("\ufffd" not in piece for piece in given)
    assert len([piece for piece in given if piece]) > 1


def test_an_answer_that_ends_within_a_character_says_so() -> None:
    ids = TOKENIZER("🦊", add_special_tokens=False)["input_ids"]
    answer = AnswerText(lambda ids: str(TOKENIZER.decode(ids)))
    assert [answer.add([id]) for id in ids[:-1]] == [""] * (len(ids) - 1)
    assert "\ufffd" in answer.end()


@pytest.mark.parametrize(
    ("text", "stops", "kept", "stopped"),
    [
        ("one STOP two", ("STOP",), "one ", "STOP"),
        ("one STO two", ("STOP",), "one STO two", None),
        ("one STO", ("STOP",), "one STO", None),
        ("aab", ("ab",), "a", "ab"),
        ("좋아요 그만 더", ("그만",), "좋아요 ", "그만"),
        ("a\n\nb", ("\n\n",), "a", "\n\n"),
        ("abcd", ("cd", "bcd"), "a", "bcd"),
        ("text", ("", "zz"), "text", None),
    ],
)
def test_nothing_of_a_stop_string_is_given_out(
    text: str, stops: tuple[str, ...], kept: str, stopped: str | None
) -> None:
    given, answer = pieces(text, stops)
    assert ("".join(given), answer.stopped_at) == (kept, stopped)
