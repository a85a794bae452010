"""Tool calls in the text of answers."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.conversation import ToolCall
from deployments.engines.chat_template import CallFormat
from deployments.engines.tool_calls import CallParser, schema_of_calls

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
        ("json", "It is {fine}.", "It is {fine}.", []),
    ],
)
def test_calls_are_found_in_text_of_any_pieces(
    form: CallFormat, text: str, said: str, found: list[ToolCall], size: int
) -> None:
    parser = CallParser(form)
    pieces = [each for at in range(0, len(text), size) for each in parser.add(text[at : at + size])] + parser.end()
    assert "".join(piece.text for piece in pieces) == said
    assert [piece.call for piece in pieces if piece.call] == found
    assert parser.found == len(found)


def test_text_that_can_be_no_call_is_given_out_at_once() -> None:
    assert [piece.text for piece in CallParser("json").add("It")] == ["It"]
    assert [piece.text for piece in CallParser("hermes").add("a <tool")] == ["a"]


def test_the_schema_of_calls_holds_each_to_its_own_tool() -> None:
    tools: list[dict[str, Any]] = [
        {"function": {"name": "a", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}},
        {"function": {"name": "b"}},
    ]
    both = schema_of_calls(tools, "required")["anyOf"]
    assert [each["properties"]["name"]["const"] for each in both] == ["a", "b"]
    assert both[0]["properties"]["arguments"] == tools[0]["function"]["parameters"]
    assert schema_of_calls(tools, "=b")["properties"]["name"] == {"const": "b"}
