"""Where Dure keeps the files it writes."""

from __future__ import annotations

import os
from pathlib import Path

from deployments.checkpoints.sources import ROOT

STATE = Path(os.path.realpath(os.environ.get("DURE_STATE") or ROOT / ".dure"))
"""Folder for logs and sockets of what this Dure starts. `dure stop` treats copies that share the folder as one."""
