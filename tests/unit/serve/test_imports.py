"""What a process of `serve` does without."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.dure import ROOT


@pytest.mark.parametrize(
    "module", ["serve.ingress", "serve.services.search", "serve.services.adverts.service", "serve.cli.main"]
)
def test_no_model_library_is_loaded(module: str) -> None:
    code = f"import sys, {module}\nprint(*sorted({{'torch', 'transformers', 'openvino'}} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=60
    )
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr
