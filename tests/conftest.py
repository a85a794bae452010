"""What must be set before torch is imported, and which tests may run beside which."""

import os
from pathlib import Path
from typing import Any

import pytest

from serve.environment import EVERYWHERE

for name in ("OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM"):
    os.environ.setdefault(name, EVERYWHERE[name])
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DURE_CACHE", str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "dure"))


NODES = "tests/cluster/test_nodes.py"
"""Has a cluster of its own."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of the shared cluster in one process, one after the other; those of other files beside them."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "cluster" if file.startswith("tests/cluster/") and file != NODES else file

    config.option.loadscopereorder = False  # the longest come first
    return ByFile(config, log)
