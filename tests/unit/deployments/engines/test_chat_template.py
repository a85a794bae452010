"""Chat templates, of which some are hostile."""

from __future__ import annotations

import time

import pytest

from deployments.engines.chat_template import EXAMPLE, ChatTemplate, try_out
from deployments.spec import CheckpointError, ItemError
from tests.checkpoints import CHAT

HELLO = [{"role": "user", "content": "Hello"}]


def test_a_conversation_becomes_text_up_to_the_answer() -> None:
    assert ChatTemplate(CHAT, {}).render(HELLO, []) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_templates_have_what_transformers_gives_them() -> None:
    source = (
        "{{ bos_token }}{%- for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}"
        "{% generation %}{{ 2 * 3 }}{{ 'ab' * 2 }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}"
        "{% set space = namespace(n=1) %}{{ space.n }}{{ dict(a=1) | tojson }}"
    )
    said = ChatTemplate(source, {"bos_token": "<s>"}).render([*HELLO, *HELLO], [])
    assert said == '<s>{"role": "user", "content": "Hello"}6abab41{"a": 1}'


def test_what_a_template_refuses_is_told_in_its_words() -> None:
    with pytest.raises(ItemError, match="roles must alternate") as refused:
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render(HELLO, [])
    assert refused.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 10 ** (10 ** 8) }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 10 ** 8 * 'a' }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ messages[0].missing.more }}",
        "{{ messages + 1 }}",
        "{{ range(10 ** 7) | list | length }}",
    ],
)
def test_hostile_and_broken_templates_end_at_once(source: str) -> None:
    started = time.monotonic()
    with pytest.raises(ItemError, match="chat template"):
        ChatTemplate(source, {}).render(HELLO, [])
    assert time.monotonic() - started < 5


def test_a_template_that_loops_is_found_out_at_load() -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(CheckpointError, match="takes over 2 s"):
        try_out(loop, {})


def test_what_is_no_template_is_refused_at_load() -> None:
    with pytest.raises(CheckpointError, match="is not a template"):
        try_out("{% for m in messages %}", {})
    try_out("{{ raise_exception('needs a system message') }}", {})
    assert EXAMPLE == HELLO


@pytest.mark.parametrize(
    ("source", "takes", "form"),
    [
        (CHAT, False, "none"),
        ("{% if tools %}{{ tools }}<tool_call>{% endif %}", True, "hermes"),
        ('{% if tools %}{"name": "f", "parameters": {}}{% endif %}', True, "json"),
        ("{{ tools }}", True, "none"),
    ],
)
def test_how_a_template_writes_calls(source: str, takes: bool, form: str) -> None:
    template = ChatTemplate(source, {})
    assert (template.takes_tools, template.call_format) == (takes, form)
