"""Outlines of checkpoints on a hub, without their weights: configs, headers, and sparse files for the weights."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.utils.tqdm import disable_progress_bars

from deployments.checkpoints import hub

CONFIGS = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
ANSWER_S = 10.0
"""Timeout of a request: the default of the hub's client for its other requests."""


@functools.cache
def outline(source: str, revision: str) -> Path:
    """A temporary folder whose weight files are as long as the real ones but take up no space on disk.

    Headers of safetensors are fetched, nothing of pickles. The folder is removed when this process ends. Raises the
    errors of the hub's client.
    """
    disable_progress_bars()
    told = HfApi().model_info(source, revision=revision, files_metadata=True, timeout=ANSWER_S)
    sizes = {file.rfilename: file.size or 0 for file in told.siblings or ()}
    folder = Path(tempfile.mkdtemp(prefix="dure-outline-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in hub.loaded(sizes):
        if name in CONFIGS:
            hf_hub_download(source, name, revision=told.sha, local_dir=folder)
        elif "/" not in name and name.endswith(".safetensors"):
            write_holes(folder / name, _header(source, name, told.sha))
        elif "/" not in name and name.endswith(".bin"):
            with (folder / name).open("wb") as file:
                file.truncate(sizes[name])
    return folder


def _header(source: str, name: str, commit: str | None) -> dict[str, Any]:
    known = HfApi().parse_safetensors_file_metadata(source, name, revision=commit)
    return {
        tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
        for tensor, info in known.tensors.items()
    }


def write_holes(path: Path, header: dict[str, Any]) -> None:
    """Write a sparse safetensors file: 8 bytes of length, the header, and a hole.

    `header` holds `dtype`, `shape` and `data_offsets` of each tensor: https://huggingface.co/docs/safetensors#format.
    """
    encoded = json.dumps(header).encode()
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
