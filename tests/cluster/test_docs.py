"""The README's commands do what it says: curls and commands run, the rest is parsed or run dry."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from deployments.engines import load_engine
from deployments.progress import LoadProgress
from deployments.spec import ModelSpec
from serve.cli import app
from serve.config_file import read_config
from serve.environment import cluster_environment
from serve.settings import Settings
from tests.dure import ROOT, Dure, curls

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = curls(README)
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
VERBS = (
    "ray get-auth-token",
    "ray up",
    "ray exec",
    "ray down",
    "kubectl create",
    "kubectl apply",
    "kubectl port-forward",
)
HOME = "~/"
"""Of a node, where cluster.yaml puts the configs."""


def of(*programs: str) -> list[str]:
    """The commands that call one of these programs."""
    return [each for each in COMMANDS if next(word for word in shlex.split(each) if "=" not in word) in programs]


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found
    return found.group(1)


@pytest.mark.parametrize("command", of("curl"))
def test_curl(dure: Dure, command: str) -> None:
    words = [word.replace("http://127.0.0.1:8000", dure.url) for word in shlex.split(command)]
    run = subprocess.run(
        [*words, "--fail-with-body", "--silent", "--max-time", "60"], capture_output=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stdout.decode() + run.stderr.decode()
    assert run.stdout


def test_the_story_of_an_advert(dure: Dure, tmp_path: Path) -> None:
    """Run as a whole: each command needs what those before it answered."""
    script = block("sh").replace("http://127.0.0.1:8000", dure.url)
    script = script.replace(".dure/job.json", str(tmp_path / "job.json"))
    script = script.replace("curl ", "curl --fail-with-body --silent --show-error ")
    run = subprocess.run(
        ["bash", "-ec", script], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False, encoding="utf-8"
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for told in ('"is_valid":true', '"cta_present":true', "event: yolo_detect", "event: ocr_eval", '"deleted":1'):
        assert told in run.stdout


@pytest.mark.parametrize("command", of("make"))
def test_make_target_exists(command: str) -> None:
    words = shlex.split(command)
    subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    for word in words:
        if word.startswith("CONFIG="):
            assert read_config(ROOT / word.removeprefix("CONFIG=")).settings.models


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


def assert_dure_takes(words: list[str]) -> None:
    """A `dure` command on another machine: there is such a command, and its config is valid."""
    known = {each.name or getattr(each.callback, "__name__", "") for each in app.registered_commands}
    assert (words[0], words[1] in known) == ("dure", True)
    config = words[words.index("--config") + 1]
    assert read_config(ROOT / config.removeprefix(HOME)).settings.models


@pytest.mark.parametrize("command", of("docker"))
def test_docker_command_is_for_the_dockerfile(command: str) -> None:
    words = shlex.split(command)
    if words[1] == "build":
        arguments = {words[place + 1].partition("=")[0] for place, word in enumerate(words) if word == "--build-arg"}
        assert arguments <= set(re.findall(r"^ARG (\w+)=", DOCKERFILE, re.MULTILINE))
        assert words[-1] == "."
    else:
        images = {shlex.split(each)[3] for each in of("docker") if each.startswith("docker build --tag")}
        image = next(place for place, word in enumerate(words) if word in images)
        assert words[1] == "run"
        if words[image + 1 :]:
            assert_dure_takes(words[image + 1 :])


@pytest.mark.parametrize("command", of("ray", "kubectl"))
def test_command_for_a_cluster_names_what_is_there(command: str) -> None:
    program, verb, *rest = shlex.split(command)
    assert f"{program} {verb}" in VERBS
    if verb == "exec":
        assert_dure_takes([word for word in shlex.split(rest.pop()) if not word.startswith("RAY_ADDRESS=")])
    for word in rest:
        if word.endswith(".yaml"):
            assert list(yaml.safe_load_all((ROOT / word).read_text(encoding="utf-8")))


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


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    tested = of("curl", "make", "dure", "docker", "ray", "kubectl", "env")
    others = [each for each in COMMANDS if each not in tested]
    assert others == ["python -m loadtests.baseline", "pre-commit run --all-files"]
    subprocess.run([sys.executable, "-c", "import loadtests.baseline"], cwd=ROOT, check=True)
    assert yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]


def test_the_example_config_is_valid() -> None:
    models = yaml.safe_load(block("yaml"))
    assert set(Settings.model_validate(models).models) == {"predictor", "lawyer"}


def test_the_example_engine_works(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("sentiment")
    exec(compile(block("python"), "sentiment.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "sentiment", module)
    spec = ModelSpec("mood", "sentiment:Sentiment", "demo/rerank/checkpoint")
    engine = load_engine(spec, LoadProgress(lambda _: None))
    engine.warm_up()
    [result] = engine.run([engine.prepare("What a day!")])
    assert 0 <= result["positive"] <= 1


def test_endpoints_of_the_readme_exist(dure: Dure) -> None:
    run = subprocess.run(["curl", "-s", f"{dure.url}/openapi.json"], capture_output=True, check=True)
    paths = json.loads(run.stdout)["paths"]
    for path in re.findall(r"`(?:GET|POST) (/[^`?]*)`", README):
        assert path in paths or path.replace("NAME", "{name}").replace("mood", "{name}") in paths or path == "/docs"


def test_files_of_the_readme_exist() -> None:
    for path in re.findall(r"`((?:serve|deployments|demo|configs|loadtests)/[^`* ]*)`", README):
        assert (ROOT / path).exists() or Path(path).suffix == "", path
