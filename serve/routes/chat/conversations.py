"""Checks conversations, tools and schemas as clients send them, and brings them into one form."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from serve import errors
from serve.config.settings import Limits
from serve.http.json_values import check_json
from serve.http.requests import check_text

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Roles, and what templates call them."""
DEEPEST = 64
"""Levels of nesting in a schema, or in the arguments of a call."""
MOST_MULTIPLE = 9999
"""A grammar for multiples of a number has a state for each remainder: over 10 s for a number of five digits."""
MOST_TOOLS = 128
MOST_STOPS, LONGEST_STOP = 64, 1000
MOST_BIASES = 1024


def messages_of(given: Any, limits: Limits) -> list[dict[str, Any]]:
    """The messages of a conversation, in OpenAI's form, with texts as contents. Raises DureError naming the field."""
    if not isinstance(given, list):
        raise errors.invalid("messages takes a list of messages", "messages")
    if len(given) > limits.max_list_items:
        raise errors.invalid(f"messages has more than {limits.max_list_items} entries", "messages")
    return [_message(each, f"messages.{number}", limits) for number, each in enumerate(given)]


def _message(given: Any, where: str, limits: Limits) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise errors.invalid(f"{where} takes an object with role and content", where)
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise errors.invalid(f"{where}.role is {str(role)[:40]!r}; it takes one of {', '.join(ROLES)}", f"{where}.role")
    calls = given.get("tool_calls") or []
    content = _text(given.get("content"), f"{where}.content", limits)
    if content is None and not calls:
        raise errors.invalid(f"{where}.content is missing", f"{where}.content")
    if given.get("images"):
        raise errors.invalid(f"{where}.images can't be used: the model reads text only", f"{where}.images")
    message: dict[str, Any] = {"role": ROLES[role], "content": content or ""}
    if role == "assistant" and calls:
        message["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    for name in ("name", "tool_call_id"):
        if isinstance(given.get(name), str):
            message[name] = given[name]
    return message


def _text(content: Any, where: str, limits: Limits) -> str | None:
    if content is None:
        return None
    if isinstance(content, str):
        check_text(content, where, limits)
        return content
    if not isinstance(content, list):
        raise errors.invalid(f"{where} takes a text or a list of parts", where)
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise errors.invalid(
                f"{where}.{number} is of type {str(kind)[:40]!r}; the model reads parts of type text only",
                f"{where}.{number}",
            )
        check_text(part["text"], f"{where}.{number}", limits)
        texts.append(part["text"])
    return "".join(texts)


def _calls(given: Any, where: str) -> list[dict[str, Any]]:
    """Calls of an earlier turn, with their arguments as objects, as templates expect them."""
    if not isinstance(given, list):
        raise errors.invalid(f"{where} takes a list", where)
    calls = []
    for number, call in enumerate(given):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise errors.invalid(f"{where}.{number} takes an object with function.name", f"{where}.{number}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):  # what is no JSON goes back to the model as it was
                arguments = json.loads(arguments)
            check_depth(arguments, f"{where}.{number}.function.arguments")
            check_json(arguments, f"{where}.{number}.function.arguments")
        known = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
        calls.append(known | ({"id": call["id"]} if isinstance(call.get("id"), str) else {}))
    return calls


def tools_of(given: Any) -> list[dict[str, Any]]:
    """The tools, checked. Raises DureError naming the field."""
    if not isinstance(given, list):
        raise errors.invalid("tools takes a list", "tools")
    if len(given) > MOST_TOOLS:
        raise errors.invalid(f"tools has {len(given)} entries, more than {MOST_TOOLS}", "tools")
    tools = []
    for number, tool in enumerate(given):
        where = f"tools.{number}"
        if not isinstance(tool, dict) or (tool.get("type") or "function") != "function":
            raise errors.invalid(f"{where}.type has to be function", f"{where}.type")
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise errors.invalid(f"{where}.function.name is missing", f"{where}.function.name")
        parameters = function.get("parameters")
        if parameters is not None:
            check_schema(parameters, f"{where}.function.parameters")
        tools.append(
            {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}
        )
    return tools


def tool_choice_of(given: Any, tools: list[dict[str, Any]]) -> str:
    """The choice as `ChatRequest` has it. Raises DureError if it names no tool."""
    if given is None:
        return "auto"
    if isinstance(given, str) and given in ("auto", "none", "required"):
        if given == "required" and not tools:
            raise errors.invalid("tool_choice is required, but there are no tools", "tool_choice")
        return given
    function = given.get("function") if isinstance(given, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise errors.invalid("tool_choice takes auto, none, required, or an object with function.name", "tool_choice")
    if all(tool["function"]["name"] != name for tool in tools):
        raise errors.invalid(f"tool_choice names {name[:80]!r}, which is not among the tools", "tool_choice")
    return f"={name}"


def check_schema(schema: Any, where: str) -> None:
    """Raises DureError if this is no schema, or one nested too deeply."""
    if not isinstance(schema, dict):
        raise errors.invalid(f"{where} takes a JSON schema", where)
    check_depth(schema, where)
    level: list[Any] = [schema]
    while level:
        for each in level:
            if isinstance(each, dict) and _digits(each.get("multipleOf")) > MOST_MULTIPLE:
                raise errors.invalid(f"{where}: multipleOf takes numbers of at most 4 digits", where)
        inner = [value for each in level for value in (each.values() if isinstance(each, dict) else each)]
        level = [each for each in inner if isinstance(each, dict | list)]


def _digits(number: Any) -> int:
    """The digits of a number without its point, as one number; 0 if it is none."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return 0
    return int("".join(filter(str.isdecimal, f"{number!r}".partition("e")[0])) or 0)


def check_depth(value: Any, where: str) -> None:
    """Raises DureError if a JSON value is nested too deeply."""
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    depth = 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise errors.invalid(f"{where} is nested over {DEEPEST} levels; simplify it", where)
        inner = [value for each in level for value in (each.values() if isinstance(each, dict) else each)]
        level = [each for each in inner if isinstance(each, dict | list)]


def biases_of(given: Any) -> dict[int, float]:
    """Biases by token id. Raises DureError for what is no such thing, or for too many."""
    if not given:
        return {}
    if not isinstance(given, dict) or len(given) > MOST_BIASES:
        raise errors.invalid(f"logit_bias takes an object of at most {MOST_BIASES} token ids", "logit_bias")
    biases = {}
    for token, bias in given.items():
        if not (token.isdecimal() and len(token) < 10 and type(bias) in (int, float) and -100 <= bias <= 100):
            raise errors.invalid("logit_bias takes numbers from -100 to 100 by token id", "logit_bias")
        biases[int(token)] = float(bias)
    return biases


def stops_of(given: Any) -> tuple[str, ...]:
    """Stop strings. Raises DureError if there are too many, or one is no text or too long."""
    stops = [given] if isinstance(given, str) else given
    if stops is None:
        return ()
    if not isinstance(stops, list) or any(not isinstance(stop, str) for stop in stops):
        raise errors.invalid("stop takes a text or a list of texts", "stop")
    if len(stops) > MOST_STOPS:
        raise errors.invalid(f"stop has {len(stops)} entries, more than {MOST_STOPS}", "stop")
    if any(len(stop) > LONGEST_STOP for stop in stops):
        raise errors.invalid(f"stop has a text of over {LONGEST_STOP} characters", "stop")
    return tuple(stop for stop in stops if stop)
