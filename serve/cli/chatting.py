"""`dure chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer

from serve.cli.options import complain, out
from serve.cli.queries import DEFAULT_URL, UrlOption
from serve.failures import MachineError, one_line, printable

CONNECT_S, SILENCE_S = 10.0, 150.0
"""Timeouts: a request may wait in the queue, or for the model to load."""


def chat(
    url: UrlOption = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="Which chat model. Left out: the first.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
) -> None:
    """Talk to a chat model. Ctrl-C stops an answer, Ctrl-D ends the conversation."""
    said: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    typed = sys.stdin.isatty()
    while (line := _line(typed)) is not None:
        if not line.strip():
            continue
        said.append({"role": "user", "content": line})
        answer = ""
        try:
            for text in answered(url, said, model):
                answer += text
                out.print(printable_lines(text), end="", highlight=False, markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            pass  # the answer ends here; what is there of it belongs to the conversation
        except MachineError as error:
            if not typed:
                raise
            complain(str(error))
            said.pop()
            continue
        out.print()
        said.append({"role": "assistant", "content": answer})


def _line(typed: bool) -> str | None:
    """The next line of the person; None at the end."""
    try:
        return input("> " if typed else "")
    except (EOFError, KeyboardInterrupt):
        return None


def answered(url: str, messages: list[dict[str, str]], model: str | None) -> Iterator[str]:
    """The answer's pieces as they are written. Raises MachineError."""
    body: dict[str, Any] = {"messages": messages, "stream": True} | ({"model": model} if model else {})
    timeout = httpx.Timeout(SILENCE_S, connect=CONNECT_S)
    try:
        with httpx.stream("POST", f"{url.rstrip('/')}/v1/chat/completions", json=body, timeout=timeout) as response:
            if not response.is_success:
                raise MachineError(_message(response.read()))
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    yield _piece(line.removeprefix("data: "))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = one_line(str(error)) or type(error).__name__
        raise MachineError(
            f"{url} does not answer ({reason}); is `dure serve` running? Set --url or DURE_URL to its address"
        ) from error


def _piece(data: str) -> str:
    found = json.loads(data)
    if "error" in found:
        raise MachineError(_message(data.encode()))
    return "".join(choice["delta"].get("content") or "" for choice in found["choices"])


def _message(content: bytes) -> str:
    try:
        return one_line(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "the answer is not one of Dure"


def printable_lines(text: str) -> str:
    """The text without what would control the terminal, but with its line breaks."""
    return "\n".join(printable(line) for line in text.split("\n"))
