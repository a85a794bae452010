"""The documents say what is so: their code works, what they name exists, and what exists is in them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fastapi.routing import APIRoute, APIWebSocketRoute

from deployments import metrics as of_replicas
from deployments.engine_loading import load_engine
from deployments.load_progress import LoadProgress
from deployments.spec import ModelSpec
from docs import config_reference
from serve import metrics as of_ingress
from serve.config.file import read_config
from serve.config.settings import Settings
from serve.ingress import routers
from tests import ingress
from tests.documents import (
    COMMANDS,
    DOCUMENTS,
    EXAMPLES,
    assert_dure_takes,
    blocks,
    dure_commands,
    of,
    of_examples,
    prose,
    run_example,
    text,
)
from tests.dure import ROOT

DOCKERFILE = text("Dockerfile")
VERBS = (
    "ray get-auth-token",
    "ray up",
    "ray exec",
    "ray down",
    "kubectl create",
    "kubectl apply",
    "kubectl port-forward",
)
FOLDERS = ("serve", "deployments", "demo", "configs", "loadtests", "tests", "docs", "examples")
ARCHITECTURE = Path("docs/architecture.md")
MODELS = {"models": {"any": {"task": "embedding", "source": "demo"}}}
DOCUMENTATION = {"/docs", "/openapi.json"}
"""FastAPI's own routes."""
LEFT_OUT = {"python -m loadtests.baseline", "pre-commit run --all-files"}
"""Commands that are not run, and are looked at here."""


def test_the_readme_is_short() -> None:
    assert len(text("README.md").splitlines()) <= 200


def test_the_changelog_has_this_version() -> None:
    version = tomllib.loads(text("pyproject.toml"))["project"]["version"]
    headings = re.findall(r"^## \[(.+?)\]", text("CHANGELOG.md"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", version]


def test_the_tables_of_settings_are_those_of_the_code() -> None:
    page = text("docs/configuration.md")
    assert config_reference.written(page) == page, "run `make config-reference`"


def test_every_setting_is_described() -> None:
    assert config_reference.undescribed() == []


@pytest.mark.parametrize("command", of("make"))
def test_make_target_exists(command: str) -> None:
    words = shlex.split(command)
    subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    for word in words:
        if word.startswith("CONFIG="):
            assert read_config(ROOT / word.removeprefix("CONFIG=")).settings.models
        for path in re.findall(r"\btests/\S+", word):
            assert (ROOT / path).exists()


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
            assert list(yaml.safe_load_all(text(word)))


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    tested = {*of("curl", "make", "dure", "docker", "ray", "kubectl", "env"), *of_examples()}
    assert set(COMMANDS) - tested == LEFT_OUT
    subprocess.run([sys.executable, "-c", "import loadtests.baseline"], cwd=ROOT, check=True)
    assert yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]


def test_every_example_is_run() -> None:
    run = {word for command in of_examples() for word in shlex.split(command) if word.startswith("examples/")}
    assert run == {str(path.relative_to(ROOT)) for path in EXAMPLES.iterdir() if path.is_file()}


@pytest.mark.parametrize("command", [each for each in of_examples() if "advert" not in each])
def test_an_example_works_over_the_real_border(command: str) -> None:
    with ingress.running() as server:
        assert run_example(command, server.url).strip()


def test_the_advert_example_ends_at_its_first_error() -> None:
    [command] = [each for each in of_examples() if "advert" in each]
    with ingress.running() as server, pytest.raises(AssertionError, match="500") as caught:
        run_example(command, server.url)  # behind this border there is no service
    assert "Stage 1" not in str(caught.value)


def test_blocks_of_json_are_json() -> None:
    found = blocks("json")
    assert found
    for block in found:
        json.loads(block)


def test_blocks_of_yaml_are_settings() -> None:
    found = [yaml.safe_load(block) for block in blocks("yaml")]
    assert {name for block in found for name in block.get("models", {})} >= {"predictor", "lawyer", "mood"}
    for block in found:
        Settings.model_validate(MODELS | block)


def test_the_example_engine_works(monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = blocks("python")
    module = types.ModuleType("sentiment")
    exec(compile(block, "sentiment.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "sentiment", module)
    spec = ModelSpec("mood", "sentiment:Sentiment", "demo/rerank/checkpoint")
    engine = load_engine(spec, LoadProgress(lambda _: None))
    engine.warm_up()
    [result] = engine.run([engine.prepare("What a day!")])
    assert 0 <= result["positive"] <= 1


def routes() -> set[str]:
    """METHOD PATH of all of them."""
    found = set()
    for router in routers(Settings.model_validate({"models": {"m": {"task": "embedding", "source": "x"}}})):
        for route in router.routes:
            if isinstance(route, APIWebSocketRoute):
                found.add(f"WS {route.path}")
            elif isinstance(route, APIRoute):
                found |= {f"{method} {route.path}" for method in route.methods - {"HEAD"}}
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_routes_that_are_named_exist(document: Path) -> None:
    for method, path in re.findall(r"`(GET|POST|DELETE|WS) (/[^`?]*)`", prose(document)):
        named = re.sub(r"NAME|\bmood\b", "{name}", path)
        assert f"{method} {named}" in routes() or path in DOCUMENTATION, f"{method} {path}"


def test_every_route_is_documented() -> None:
    page = text("docs/api.md")
    assert [route for route in sorted(routes()) if f"`{route}`" not in page] == []


def exposed() -> set[str]:
    """The names of all metrics, as Prometheus has them."""
    registries = (of_ingress.REGISTRY, of_replicas.REGISTRY)
    families = [family for registry in registries for family in registry.collect()] + of_ingress.of_lanes({})
    return {f"{family.name}_total" if family.type == "counter" else family.name for family in families}


def test_the_metrics_that_there_are_are_those_that_are_documented() -> None:
    names = set(re.findall(r"`((?:dure_|predictions?_)\w+)(?:\{.*?\})?`", prose("docs/operations.md")))
    assert names == exposed()


def test_every_command_of_dure_is_documented() -> None:
    page = text("docs/operations.md")
    assert [name for name in sorted(dure_commands()) if f"`dure {name}`" not in page] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_files_that_are_named_exist(document: Path) -> None:
    if document == ARCHITECTURE and not (ROOT / "serve/queues").is_dir():
        pytest.xfail("it describes the layout that serve/ and deployments/ are about to have")
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[^`* ]*)`", prose(document)):
        assert (ROOT / path).exists(), path


def links(document: Path) -> Iterator[tuple[Path, str]]:
    """The file and the anchor that each link within the repository leads to."""
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(document))):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            yield (ROOT / document).parent / file if file else ROOT / document, anchor


def anchors(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(file.resolve().relative_to(ROOT)), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document: Path) -> None:
    for file, anchor in links(document):
        assert file.exists(), file
        assert not anchor or anchor in anchors(file), f"{file}#{anchor}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, left = set(), [ROOT / "README.md"]
    while left:
        file = left.pop()
        if file not in reached and file.suffix == ".md":
            reached.add(file)
            left += [target.resolve() for target, _ in links(file.relative_to(ROOT))]
    assert {ROOT / document for document in DOCUMENTS} <= reached
