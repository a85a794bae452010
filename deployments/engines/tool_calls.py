"""Tool calls: the grammars that hold an answer to the tools' schemas, and the calls in an answer's text."""

from __future__ import annotations

import json
from typing import Any

from llguidance import StructTag

from deployments.conversation import TextPiece, ToolCall
from deployments.engines.chat_template import CallFormat
from deployments.engines.grammar import COMPACT

OPEN, CLOSE = "<tool_call>", "</tool_call>"
DEEPEST = 64
"""Levels of nesting in a call's arguments."""


def grammar_of_calls(tools: list[dict[str, Any]], choice: str) -> str:
    """A grammar for one call, of any tool if `choice` is `required`, else of the tool after its `=`.

    Each tool's schema is one of its own, so that its references mean what they say.
    """
    named = [_function(tool) for tool in tools]
    wanted = [each for each in named if choice == "required" or each["name"] == choice[1:]]
    lines = ["%llguidance {}", "start: " + " | ".join(f"call_{number}" for number in range(len(wanted)))]
    for number, function in enumerate(wanted):
        begin = json.dumps('{"name":' + json.dumps(function["name"]) + ',"arguments":')
        schema = {**_parameters(function), "x-guidance": COMPACT}
        lines += [f'call_{number}: {begin} args_{number} "}}"', f"args_{number}: %json {json.dumps(schema)}"]
    return "\n".join(lines)


def grammar_of_tags(tools: list[dict[str, Any]], is_token: bool) -> str:
    """A grammar for free text with calls in tags between, each with arguments that match its tool's schema.

    `is_token` says whether the opening tag is a token of its own.
    """
    tags = [
        StructTag(
            trigger=OPEN,
            begin=f'{OPEN}\n{{"name": {json.dumps(each["name"])}, "arguments": ',
            grammar=_parameters(each),
            end=f"}}\n{CLOSE}",
        )
        for each in map(_function, tools)
    ]
    return str(StructTag.to_grammar(tags, assume_special=is_token))


def described(tools: list[dict[str, Any]]) -> str:
    """The tools in words, for a model whose template has no place for them."""
    lines = [json.dumps(_function(tool), ensure_ascii=False) for tool in tools]
    return "\n".join(["You can call one of these functions by answering with its name and arguments as JSON:", *lines])


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    function: dict[str, Any] = tool["function"]
    return function


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    return function.get("parameters") or {"type": "object"}


class CallParser:
    """Splits an answer's text into what is said and the calls in it, as it comes."""

    def __init__(self, form: CallFormat, names: list[str]) -> None:
        """`names` are those of the tools: what names another is no call."""
        self.form = form
        self.names = names
        self._held = ""
        self._begun = False
        self.found = 0

    def add(self, text: str) -> list[TextPiece]:
        """What can be given out now."""
        self._held += text
        if self.form == "none":
            return self._flushed()
        if self.form == "json":
            return [] if self._may_be_json() else self._flushed()
        return self._tagged()

    def end(self) -> list[TextPiece]:
        """The rest of the answer."""
        text = self._held.strip().removeprefix(OPEN) if self.form == "hermes" else self._held
        if self.form != "none" and (call := self._call(text)):
            self._held = ""
            return [TextPiece(call=call)]
        return self._flushed()

    def _flushed(self) -> list[TextPiece]:
        text, self._held = self._held, ""
        self._begun = self._begun or bool(text)
        return [TextPiece(text)] if text else []

    def _may_be_json(self) -> bool:
        return not self._begun and self._held.lstrip()[:1] in ("", "{")

    def _tagged(self) -> list[TextPiece]:
        pieces: list[TextPiece] = []
        while True:
            before, tag, after = self._held.partition(OPEN)
            inside, closed, rest = after.partition(CLOSE)
            if not closed:  # no tag, or one that is still open
                keep = 0 if tag else self._begin_of_tag(before)
                told = before[: len(before) - keep].rstrip()  # spaces before a tag are not part of what is said
                self._held = self._held[len(told) :]
                return [*pieces, *([TextPiece(told)] if told else [])]
            call = self._call(inside)
            told = before.rstrip() if call else before + tag + inside + closed
            pieces += [TextPiece(told)] if told else []
            pieces += [TextPiece(call=call)] if call else []
            self._held = rest

    def _begin_of_tag(self, text: str) -> int:
        """How many characters at the end of the text may be the beginning of a tag."""
        sizes = range(min(len(OPEN) - 1, len(text)), 0, -1)
        return next((size for size in sizes if OPEN.startswith(text[-size:])), 0)

    def _call(self, text: str) -> ToolCall | None:
        """The call that this JSON is, counted; None if it is no call of one of the tools."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or found.get("name") not in self.names:
            return None
        arguments = found.get("arguments", found.get("parameters"))
        if not isinstance(arguments, dict) or _depth(arguments) > DEEPEST:
            return None
        self.found += 1
        return ToolCall(found["name"], json.dumps(arguments, ensure_ascii=False))


def _depth(value: Any) -> int:
    """Levels of nesting, counted no further than is allowed."""
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        depth += 1
        inner = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
        level = [each for each in inner if isinstance(each, dict | list)]
    return depth
