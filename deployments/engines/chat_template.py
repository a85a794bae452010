"""Turns conversations into the text that a model was trained on, by the checkpoint's own Jinja template."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from datetime import datetime
from typing import Any, Literal

import jinja2
import jinja2.ext
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deployments.spec import CheckpointError, ItemError, first_line

LONGEST = 10_000_000
"""Most characters, or entries of a list, that a template may make by one multiplication."""
LARGEST = 2**64
"""Largest number that a template may make by one operation."""
CallFormat = Literal["hermes", "json", "none"]
"""How the model writes a tool call: JSON in <tool_call> tags (Qwen, Hermes), the whole answer as JSON (Llama 3), or in
no way that the template says."""


class _Environment(ImmutableSandboxedEnvironment):
    """Bounds what the sandbox does not: `10 ** 10 ** 8` alone would hold the interpreter's lock for minutes."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            if abs(left) > 1 and abs(right) > 64:
                raise SecurityError("the template raises a number to a power over 64")
        else:
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | bytes | list | tuple) and len(many) * int(times) > LONGEST:
                    raise SecurityError(f"the template repeats something to over {LONGEST} entries")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int | float) and abs(result) > LARGEST:
            raise SecurityError(f"the template makes a number over {LARGEST}")
        return result


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training. Here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  # jinja declares it so

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A checkpoint's template, with the globals and filters that transformers gives templates."""

    def __init__(self, source: str, specials: dict[str, str]) -> None:
        """`specials` are the tokenizer's special tokens by role, such as `bos_token`.

        Raises CheckpointError if it is not a template.
        """
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the checkpoint's chat_template is not a template: {first_line(error)}") from error
        self.source = source
        self.specials = specials

    @property
    def takes_tools(self) -> bool:
        return re.search(r"\btools\b", self.source) is not None

    @property
    def call_format(self) -> CallFormat:
        if not self.takes_tools:
            return "none"
        if "<tool_call>" in self.source:
            return "hermes"
        return "json" if '"parameters"' in self.source else "none"

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        """The conversation as text, up to where the answer begins. Raises ItemError with what the template says."""
        try:
            return self._template.render(
                messages=messages, tools=tools or None, add_generation_prompt=True, **self.specials
            )
        except jinja2.TemplateError as error:
            raise ItemError(f"the model's chat template refuses the conversation: {error}", "messages") from error
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ItemError(
                f"the model's chat template can't take the conversation: {first_line(error)}", "messages"
            ) from error


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


EXAMPLE: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
RENDER_S = 2
"""Seconds in which a template has to render the example."""
START_S = 60.0
"""Time for a process to start and render it."""


def try_out(source: str, specials: dict[str, str]) -> None:
    """Render the example in a process of its own, as a template may loop for ever.

    Raises CheckpointError if the template takes too long or is no template. One that refuses the example is fine.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    try:
        tried = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps([source, specials]),
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=environment,
            timeout=START_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"no process to try the chat_template in could be started in {START_S:.0f} s") from error
    if tried.returncode == -signal.SIGALRM:
        raise CheckpointError(f"the checkpoint's chat_template takes over {RENDER_S} s for one short message")
    if tried.returncode:
        said = tried.stderr.strip().rpartition("\n")[2]
        raise CheckpointError(said or "the checkpoint's chat_template ended the process that tried it")


def _main() -> None:
    source, specials = json.load(sys.stdin)
    signal.alarm(RENDER_S)  # ends the process, even within one long operation
    try:
        ChatTemplate(source, specials).render(EXAMPLE, [])
    except ItemError:
        return
    except CheckpointError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    _main()
