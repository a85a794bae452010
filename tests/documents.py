"""Reads this repository's documents: their commands, code and prose."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.cli.main import app
from serve.config.file import read_config
from tests.dure import ROOT

DOCUMENTS = [
    path.relative_to(ROOT)
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
]
EXAMPLES = ROOT / "examples"
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
HOME = "~/"
"""Home folder of a node, where cluster.yaml puts the configs."""
OWN_WEBSOCKET = 22
"""First version of Node with WebSocket by default. Node 20 has it behind a switch."""


def text(document: Path | str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def prose(document: Path | str) -> str:
    """The document without its blocks of code."""
    return FENCED.sub("", text(document))


def blocks(language: str) -> list[str]:
    """All code blocks in a language, from all documents."""
    return [body for document in DOCUMENTS for kind, body in FENCED.findall(text(document)) if kind == language]


def _commands() -> Iterator[str]:
    for block in blocks("bash"):
        lines = block.replace("\\\n", " ").splitlines()
        yield from (line.strip() for line in lines if line.strip() and not line.strip().startswith("#"))


COMMANDS = list(dict.fromkeys(_commands()))
"""The commands of all bash blocks, without duplicates, continuation lines joined."""


def of(*programs: str) -> list[str]:
    """The commands that call one of these programs."""
    return [each for each in COMMANDS if _program(each) in programs]


def _program(command: str) -> str:
    return next(word for word in shlex.split(command) if "=" not in word)


def of_examples() -> list[str]:
    """The commands that run an example."""
    return [each for each in COMMANDS if any(word.startswith("examples/") for word in shlex.split(each))]


def run_example(command: str, url: str) -> str:
    """Run an example's command against the server at `url` and return its output. Skips if Node is missing or old."""
    program, *rest = shlex.split(command)
    words = {"python": [sys.executable], "node": _node, "bash": ["bash"]}[program]
    run = subprocess.run(
        [*(words() if callable(words) else words), *rest],
        cwd=ROOT,
        env={**os.environ, "DURE_URL": url},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def _node() -> list[str]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True, encoding="utf-8").stdout
    major = int(version.strip().removeprefix("v").partition(".")[0])
    if major < OWN_WEBSOCKET - 2:
        pytest.skip(f"Node {major} has no WebSocket")
    return [node] if major >= OWN_WEBSOCKET else [node, "--experimental-websocket"]


def assert_dure_takes(words: list[str]) -> None:
    """Assert that a `dure` command for another machine exists and that its config is valid."""
    assert (words[0], words[1] in dure_commands()) == ("dure", True)
    config = words[words.index("--config") + 1]
    assert read_config(ROOT / config.removeprefix(HOME)).settings.models


def dure_commands() -> set[str]:
    """The names of all `dure` commands and groups."""
    named = {each.name or getattr(each.callback, "__name__", "") for each in app.registered_commands}
    return named | {group.name for group in app.registered_groups if group.name}
