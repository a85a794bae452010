"""Sets the environment before torch is imported, and decides which tests may run in parallel."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve.operate.environment import EVERYWHERE

for name in ("OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM"):
    os.environ.setdefault(name, EVERYWHERE[name])
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" not in os.environ and not (Path.home() / ".ray" / "auth_token").exists():
    # On a new machine, two clusters that start at once would each make a token, and the first reject its own nodes.
    subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "get-auth-token", "--generate"], capture_output=True, timeout=60
    )
os.environ.setdefault("DURE_CACHE", str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "dure"))


OWN = ("tests/cluster/test_lifecycle.py", "tests/cluster/test_nodes.py")
"""Files whose tests start their own clusters."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests with their own clusters after the shared cluster has started.

    Ray gives a node 30 s to start, which is short if several start on few cores.
    """

    def later(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        return 1 if file.startswith("tests/store/") else 2 if file in OWN else 3 if "/unit/" in file else 0

    items.sort(key=later)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run all tests of the shared cluster in one process, and each other file in parallel to them."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "cluster" if file.startswith("tests/cluster/") and file not in OWN else file

    config.option.loadscopereorder = False  # keep the order: the longest come first
    return ByFile(config, log)
