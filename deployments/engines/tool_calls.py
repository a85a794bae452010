"""Tool calls: the grammars that hold an answer to the tools' schemas, and the calls in an answer's text."""

from __future__ import annotations

import json
from typing import Any

from llguidance import StructTag

from deployments.conversation import TextPiece, ToolCall
from deployments.engines.chat_template import CallFormat

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def schema_of_calls(tools: list[dict[str, Any]], choice: str) -> dict[str, Any]:
    """The schema of one call, of any tool if `choice` is `required`, else of the tool after its `=`."""
    named = [_function(tool) for tool in tools]
    wanted = [each for each in named if choice == "required" or each["name"] == choice[1:]]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": each["name"]}, "arguments": _parameters(each)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for each in wanted
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


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

    def __init__(self, form: CallFormat) -> None:
        self.form = form
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
        if self.form != "none" and (call := _call(text)):
            self.found += 1
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
            if not tag:
                sizes = range(min(len(OPEN) - 1, len(before)), -1, -1)
                keep = next(size for size in sizes if OPEN.startswith(before[len(before) - size :]))
                told = before[: len(before) - keep].rstrip()  # spaces before a tag are not part of what is said
                self._held = self._held[len(told) :]
                return [*pieces, *([TextPiece(told)] if told else [])]
            inside, closed, rest = after.partition(CLOSE)
            if not closed:
                self._held = tag + after
                told = before.rstrip()
                return [*pieces, *([TextPiece(told)] if told else [])]
            call = _call(inside)
            told = before.rstrip() if call else before + tag + inside + closed
            pieces += [TextPiece(told)] if told else []
            if call:
                self.found += 1
                pieces.append(TextPiece(call=call))
            self._held = rest


def _call(text: str) -> ToolCall | None:
    """The call that this JSON is; None if it is not one."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(found["name"], written)
