"""Text is UTF-8 whatever the locale: every place that reads or writes some has to say so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dure import ROOT

FOLDERS = ("serve", "deployments", "demo", "loadtests", "tests")
OPENERS = {"open", "fdopen"}
MODES = {"r", "w", "a", "x", "r+", "w+", "a+", "rt", "wt"}
TEXT_FILES = {"read_text", "write_text"}
TEXT_STREAMS = {"text", "universal_newlines"}
"""Arguments that make a subprocess speak text."""


def left_to_the_locale(source: str) -> Iterator[ast.Call]:
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        named = {keyword.arg for keyword in call.keywords}
        values = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        modes = {value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)}
        built_in = isinstance(call.func, ast.Name) and not any("b" in mode for mode in modes)
        opened = name in OPENERS and (modes & MODES or built_in)
        piped = ast.unparse(call.func).startswith("subprocess.") and named & TEXT_STREAMS
        if (name in TEXT_FILES or opened or piped) and "encoding" not in named:
            yield call


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("path.read_text()", 1),
        ("path.write_text('a')", 1),
        ("path.open('w')", 1),
        ("open(path, 'r')", 1),
        ("open(path)", 1),
        ("open(path, mode='w')", 1),
        ("open(path, 'rb')", 0),
        ("Image.open(path)", 0),
        ("subprocess.run(['a'], text=True)", 1),
        ("path.read_text(encoding='utf-8')", 0),
        ("path.open('wb')", 0),
        ("subprocess.run(['a'])", 0),
    ],
)
def test_what_is_left_to_the_locale_is_found(source: str, count: int) -> None:
    assert len(list(left_to_the_locale(source))) == count


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_is_left_to_the_locale(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in sorted(Path(ROOT / folder).rglob("*.py"))
        if not {".venv", "node_modules"} & set(path.parts)
        for call in left_to_the_locale(path.read_text(encoding="utf-8"))
    ]
    assert not found, "say encoding='utf-8'"
