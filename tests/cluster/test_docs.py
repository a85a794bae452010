"""The commands of the documents do what these say: those for a running server run, those for others are run dry."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from serve.config.file import read_config
from serve.operate.environment import cluster_environment
from tests.documents import of, of_examples, run_example
from tests.dure import ROOT, Dure


@pytest.mark.parametrize("command", of("curl"))
def test_curl(dure: Dure, command: str) -> None:
    words = [word.replace("http://127.0.0.1:8000", dure.url) for word in shlex.split(command)]
    run = subprocess.run(
        [*words, "--fail-with-body", "--silent", "--max-time", "60"], capture_output=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stdout.decode() + run.stderr.decode()
    assert run.stdout


@pytest.mark.parametrize("command", of_examples())
def test_an_example(dure: Dure, command: str) -> None:
    told = run_example(command, dure.url)
    expected = {
        "examples/embeddings.py": ["The landlord returns the deposit within 14 days."],
        "examples/typing.mjs": ["오늘 날씨가 "],
        "examples/chat.py": ["Paris"],
        "examples/advert.sh": [
            '"is_valid":true',
            '"cta_present":true',
            "event: yolo_detect",
            "event: ocr_eval",
            '"deleted":1',
        ],
    }
    for words in expected[next(word for word in shlex.split(command) if word.startswith("examples/"))]:
        assert words in told


def test_the_load_test(dure: Dure, tmp_path: Path) -> None:
    """For some seconds, as `make loadtest` says it."""
    arguments = f"--host {dure.url} --users 12 --run-time 8s --html {tmp_path}/report.html --json-file {tmp_path}/all"
    told = subprocess.run(
        ["make", "--dry-run", "loadtest", f"ARGS={arguments}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        encoding="utf-8",
    ).stdout.replace("\\\n", "")
    recipe = next(line for line in told.splitlines() if "-m locust" in line)
    command = [sys.executable, *shlex.split(recipe)[1:]]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False, encoding="utf-8")
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("WS /ws/{id}", "POST /v1/embeddings (lists)", "GET /v1/queues", "GET /metrics"):
        assert f"| {name} " in run.stdout
    assert (tmp_path / "report.html").stat().st_size


@pytest.mark.parametrize("command", of("dure"))
def test_dure_command(dure: Dure, command: str) -> None:
    words = [word for word in shlex.split(command) if not word.startswith("RAY_ADDRESS=")]
    if words[1] in ("status", "predict", "bench"):
        run = dure.command(*words[1:], seconds=150)
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip()
    else:
        assert dure.command(words[1], "--help").returncode == 0
        if "--config" in words:
            assert read_config(ROOT / words[words.index("--config") + 1]).settings.models


@pytest.mark.parametrize("command", of("env"))
def test_a_node_is_started_with_an_environment(dure: Dure, command: str) -> None:
    words = shlex.split(command)
    assert words[1:3] == ["$(dure", "environment)"]
    told = dure.command("environment").stdout.split()
    assert dict(line.split("=") for line in told).items() >= cluster_environment().items()
    assert words[3] == "ray"
    ray = [sys.executable, "-m", "ray.scripts.scripts", words[4], "--help"]
    options = subprocess.run(ray, capture_output=True, text=True, check=True, encoding="utf-8").stdout
    for word in words[5:]:
        assert not word.startswith("--") or word in options
