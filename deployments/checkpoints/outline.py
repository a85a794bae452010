"""A hub's checkpoint as far as it can be known without its weights: configs, headers, and holes where weights are."""

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
"""As the hub's client gives a hub for all else that is asked here."""


@functools.cache
def outline(source: str, revision: str) -> Path:
    """A folder, until this process ends, whose weights' files are as long as the real ones and take up no room.

    Of safetensors the headers are fetched, of pickles nothing. Raises what the hub's client raises.
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
    """A file of safetensors: 8 bytes of length, the header, and a hole: https://huggingface.co/docs/safetensors#format.

    `header`: of each tensor its `dtype`, `shape` and `data_offsets`.
    """
    encoded = json.dumps(header).encode()
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
