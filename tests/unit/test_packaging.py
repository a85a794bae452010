"""What is installed is complete, and hosted CI checks what `.ci/run` checks."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml

from tests.dure import ROOT

SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
WORKFLOW = ROOT / ".github/workflows/ci.yml"


def test_every_package_is_installed() -> None:
    folders = {path.parent for top in ("serve", "deployments") for path in (ROOT / top).rglob("*.py")}
    assert set(SETUPTOOLS["packages"]) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


@pytest.mark.parametrize("package", ["serve", "deployments"])
def test_type_checkers_are_told_that_a_package_is_typed(package: str) -> None:
    assert "py.typed" in SETUPTOOLS["package-data"][package]


def test_data_files_are_there() -> None:
    for package, files in SETUPTOOLS["package-data"].items():
        for file in files:
            assert (ROOT / package / file).is_file(), f"{package}/{file}"


def test_hosted_ci_runs_the_commands_of_the_ci_script() -> None:
    script = re.findall(r"^make .*$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
    [job] = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"].values()
    hosted = [step["run"] for step in job["steps"] if step.get("run", "").startswith("make ")]
    assert script == hosted == ["make lint", "make test"]
