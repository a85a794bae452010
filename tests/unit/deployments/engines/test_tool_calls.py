"""Tool calls in the text of answers."""

from __future__ import annotations

from typing import Any

import llguidance.hf
import pytest
from llguidance import LLMatcher
from transformers import PreTrainedTokenizerFast

from deployments.conversation import ToolCall
from deployments.engines.chat_template import CallFormat
from deployments.engines.tool_calls import CallParser, grammar_of_calls
from tests.checkpoints import byte_level

WEATHER = ToolCall("weather", '{"city": "서울"}')
TAGGED = '<tool_call>\n{"name": "weather", "arguments": {"city": "서울"}}\n</tool_call>'
PLAIN = '{"name": "weather", "arguments": {"city": "서울"}}'
LLAMA = '{"name": "weather", "parameters": {"city": "서울"}}'


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("form", "text", "said", "found"),
    [
        ("none", TAGGED, TAGGED, []),
        ("hermes", f"Let me see.\n{TAGGED}", "Let me see.", [WEATHER]),
        ("hermes", f"{TAGGED}\n{TAGGED}", "", [WEATHER, WEATHER]),
        ("hermes", "a < b <tool", "a < b <tool", []),
        ("hermes", "<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
        ("hermes", TAGGED.removesuffix("\n</tool_call>"), "", [WEATHER]),
        ("json", PLAIN, "", [WEATHER]),
        ("json", LLAMA, "", [WEATHER]),
        ("json", '{"name": 1}', '{"name": 1}', []),
        ("json", '{"name": "Alice", "age": 3}', '{"name": "Alice", "age": 3}', []),
        ("json", '{"name": "weather"}', '{"name": "weather"}', []),
        ("json", '{"name": "weather", "arguments": null}', '{"name": "weather", "arguments": null}', []),
        ("json", '{"name":' * 5000, '{"name":' * 5000, []),
        ("json", "It is {fine}.", "It is {fine}.", []),
    ],
)
def test_calls_are_found_in_text_of_any_pieces(
    form: CallFormat, text: str, said: str, found: list[ToolCall], size: int
) -> None:
    parser = CallParser(form, ["weather"])
    pieces = [each for at in range(0, len(text), size) for each in parser.add(text[at : at + size])] + parser.end()
    assert "".join(piece.text for piece in pieces) == said
    assert [piece.call for piece in pieces if piece.call] == found
    assert parser.found == len(found)


def test_text_that_can_be_no_call_is_given_out_at_once() -> None:
    assert [piece.text for piece in CallParser("json", ["weather"]).add("It")] == ["It"]
    assert [piece.text for piece in CallParser("hermes", ["weather"]).add("a <tool")] == ["a"]


@pytest.mark.parametrize(
    ("written", "fits"),
    [
        ('{"name":"a","arguments":{"x":1}}', True),
        ('{"name":"a","arguments":{"x":"1"}}', False),
        ('{"name":"b","arguments":{"who":{"age":1}}}', True),
        ('{"name":"b","arguments":{"who":{"age":"1"}}}', False),
        ('{"name":"c","arguments":{}}', False),
    ],
)
def test_the_grammar_of_calls_holds_each_to_its_own_tool(written: str, fits: bool) -> None:
    person = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    tools: list[dict[str, Any]] = [
        {"function": {"name": "a", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}},
        {
            "function": {
                "name": "b",
                "parameters": {
                    "type": "object",
                    "properties": {"who": {"$ref": "#/$defs/person"}},
                    "$defs": {"person": person},
                },
            }
        },
    ]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level("<end>"), eos_token="<end>")
    ids = tokenizer.encode(written, add_special_tokens=False)
    for choice, of in (("required", tools), (f"={written[9]}", tools)):
        if choice == "=c":
            continue
        matcher = LLMatcher(llguidance.hf.from_tokenizer(tokenizer), grammar_of_calls(of, choice))
        assert not matcher.is_error(), matcher.get_error()
        assert (matcher.try_consume_tokens(ids) == len(ids)) == fits
