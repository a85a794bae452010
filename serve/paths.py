"""Where Dure keeps what it writes."""

from __future__ import annotations

import os
from pathlib import Path

from deployments.checkpoints.sources import ROOT

STATE = Path(os.path.realpath(os.environ.get("DURE_STATE") or ROOT / ".dure"))
"""Logs and sockets of what is started from here; two copies of Dure with the same folder are one to `dure stop`."""
