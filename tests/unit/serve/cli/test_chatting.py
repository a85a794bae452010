"""`dure chat` against the real ingress with a fake model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests import ingress
from tests.dure import ROOT, free_port


@pytest.fixture(scope="module")
def server() -> Iterator[ingress.Running]:
    with ingress.running() as running:
        yield running


def chat(typed: str, *options: str) -> tuple[int, str, str]:
    run = subprocess.run(
        [sys.executable, "-m", "serve", "chat", *options],
        input=typed,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
        check=False,
        encoding="utf-8",
    )
    return run.returncode, run.stdout, run.stderr


def test_answers_come_and_the_conversation_is_kept(server: ingress.Running) -> None:
    url = f"http://127.0.0.1:{server.port}"
    assert chat("안녕\n\nAgain\n", "--url", url, "--system", "Be short.") == (0, "One word.\nOne word.\n", "")
    handle: Any = server.graph.models["chat"].handle
    assert [(each["role"], each["content"]) for each in handle.asked[-1].messages] == [
        ("system", "Be short."),
        ("user", "안녕"),
        ("assistant", "One word."),
        ("user", "Again"),
    ]


def test_what_goes_wrong_is_one_line(server: ingress.Running) -> None:
    url = f"http://127.0.0.1:{server.port}"
    code, said, problem = chat("Hi\n", "--url", url, "--model", "nope")
    assert (code, said) == (1, "")
    assert problem.startswith("no model 'nope'")
    code, _, problem = chat("Hi\n", "--url", f"http://127.0.0.1:{free_port()}")
    assert code == 1
    assert "is `dure serve` running?" in problem
    assert problem.count("\n") == 1
