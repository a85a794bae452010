"""Outlines of checkpoints on a hub: configs and headers, with sparse files in place of weights."""

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
"""Timeout of the request for the list of files: the default of the hub's client for its other requests."""


@functools.cache
def outline(source: str, revision: str) -> Path:
    """A temporary folder whose weight files are as long as the real ones but take up no space on disk.

    Of safetensors files the headers are fetched, of pickled weights nothing. The folder is removed when this process
    ends. Raises the errors of the hub's client.
    """
    disable_progress_bars()
    info = HfApi().model_info(source, revision=revision, files_metadata=True, timeout=ANSWER_S)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    folder = Path(tempfile.mkdtemp(prefix="dure-outline-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in hub.loaded(sizes):
        if name in CONFIGS:
            hf_hub_download(source, name, revision=info.sha, local_dir=folder)
        elif "/" not in name and name.endswith(".safetensors"):
            write_holes(folder / name, _header(source, name, info.sha))
        elif "/" not in name and name.endswith(".bin"):
            with (folder / name).open("wb") as file:
                file.truncate(sizes[name])
    return folder


def _header(source: str, file: str, commit: str | None) -> dict[str, Any]:
    """The header of a safetensors file on the hub, as `write_holes` takes it."""
    metadata = HfApi().parse_safetensors_file_metadata(source, file, revision=commit)
    return {
        name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
        for name, tensor in metadata.tensors.items()
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
