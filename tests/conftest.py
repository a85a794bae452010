"""What must be set before torch is imported."""

import os
from pathlib import Path

from serve.environment import EVERYWHERE

for name in ("OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM"):
    os.environ.setdefault(name, EVERYWHERE[name])
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DURE_CACHE", str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "dure"))
