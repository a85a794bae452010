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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of a cluster in one process, one after the other; those of other files beside them."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "cluster" if nodeid.startswith("tests/cluster/") else nodeid.partition("::")[0]

    return ByFile(config, log)
