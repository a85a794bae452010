"""Reads what a checkpoint contains from the headers of its files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel
from safetensors import SafetensorError, safe_open

from deployments.checkpoints.files import CONFIG, read_as
from deployments.checkpoints.modules import transformer_folders, weighted_folders
from deployments.load_progress import LoadProgress
from deployments.spec import CheckpointError, first_line

POINTER = b"version https://git-lfs"


class Index(BaseModel):
    """What is read of the index of a sharded checkpoint. transformers needs both."""

    weight_map: dict[str, str]
    metadata: dict[str, Any]


class Layout:
    """Which shard holds which tensor, and the bytes of each tensor, from the files' headers alone.

    If weights are there twice, those that transformers loads: safetensors before pickles, one file before several.
    """

    def __init__(
        self, shards: list[str], tensors: dict[str, tuple[str, int]], shapes: dict[str, list[int]], values: int
    ) -> None:
        self.shards = shards
        self.tensors = tensors
        self.shapes = shapes
        """Shape of each tensor; empty for pickles, which have no header."""
        self.values = values
        """Number of weights in all tensors together."""

    @classmethod
    def read(cls, folder: Path) -> Layout:
        """The weights of all modules. Raises CheckpointError if weights are missing, or if their files are damaged."""
        needs_config = transformer_folders(folder)
        layout = cls([], {}, {}, 0)
        for part in weighted_folders(folder):
            if part in needs_config and not (part / CONFIG).is_file():
                raise CheckpointError(f"there is no {CONFIG} in {part}")
            layout._add(str(part.relative_to(folder)), cls._of_part(part))
        return layout

    @classmethod
    def _of_part(cls, folder: Path) -> Layout:
        for name in ("model.safetensors", "pytorch_model.bin"):
            index = folder / f"{name}.index.json"
            if (folder / name).is_file():
                where: dict[str, str] = {}
            elif index.is_file():
                where = _weight_map(index)
            else:
                continue
            shards = sorted(set(where.values())) or [name]
            if name.endswith(".bin"):
                known = {tensor: (shard, 1) for tensor, shard in where.items()}
                return cls(shards, known, {}, _pickled_values(folder, shards))
            headers = {shard: tensors(folder / shard) for shard in shards}
            sizes = {t: (shard, _bytes(tensor)) for shard in shards for t, tensor in headers[shard].items()}
            shapes = {t: tensor["shape"] for header in headers.values() for t, tensor in header.items()}
            return cls(shards, sizes, shapes, sum(map(math.prod, shapes.values())))
        raise CheckpointError(f"there are no weights in {folder}: neither model.safetensors nor pytorch_model.bin")

    def _add(self, path: str, part: Layout) -> None:
        """Add the weights of a module, whose folder is at this path."""
        self.shards += [f"{path}/{shard}" for shard in part.shards]
        self.tensors |= {tensor: (f"{path}/{shard}", size) for tensor, (shard, size) in part.tensors.items()}
        self.shapes |= part.shapes
        self.values += part.values

    def follow(self, parameters: Iterable[tuple[str, Any]], progress: LoadProgress) -> Iterator[tuple[str, Any]]:
        """Yield the loader's parameters one by one, reporting the bytes of those already loaded.

        A parameter is loaded once the next is asked for. Its mapping lists its tensors in the checkpoint.
        """
        pairs = list(parameters)
        left = {shard: sum(1 for where, _ in self.tensors.values() if where == shard) for shard in self.shards}
        total = sum(size for _, size in self.tensors.values())
        done = 0
        reported = (-1, -1)
        for number, (name, mapping) in enumerate(pairs, 1):
            sources = self._sources(name, mapping)
            yield name, mapping
            for source in sources:
                shard, size = self.tensors[source]
                done += size
                left[shard] -= 1
            percent = 100 * (done / total if total else number / len(pairs))
            if number == len(pairs):  # tensors that the model does not use are never asked for
                percent, left = 100, dict.fromkeys(left, 0)
            complete = sum(1 for count in left.values() if count <= 0)
            if (int(percent), complete) != reported:
                reported = (int(percent), complete)
                progress.checkpoint(percent, complete, len(self.shards))

    def _sources(self, name: str, mapping: Any) -> list[str]:
        """Names, in the checkpoint, of the tensors that make up a parameter."""
        names = {name, *(key for keys in getattr(mapping, "layer_targets", {}).values() for key in keys)}
        return [key for key in names if key in self.tensors]


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor, from the index of a sharded checkpoint. All shards are in the index's folder."""
    where = read_as(index, Index).weight_map
    if not where:
        raise CheckpointError(f"{index} names no files; save the model again")
    for shard in sorted(set(where.values())):
        if PurePath(shard).name != shard or shard in ("", ".."):
            raise CheckpointError(f"{index} names the file {shard!r}, which is not in its folder; put all files there")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index.parent} lacks {shard}, named in {index.name}")
    return where


def _pickled_values(folder: Path, shards: list[str]) -> int:
    """Estimate the number of weights in pickles from their size: 16 bits each if the config says so, else 32."""
    size = sum((folder / shard).stat().st_size for shard in shards)
    config = folder / "config.json"
    return size // (2 if config.is_file() and b"float16" in config.read_bytes() else 4)


def _bytes(tensor: dict[str, Any]) -> int:
    begin, end = tensor["data_offsets"]
    return int(end - begin)


def tensors(path: Path) -> dict[str, dict[str, Any]]:
    """The entry of each tensor in a safetensors file's header (8 bytes of length, then JSON)."""
    with path.open("rb") as file:
        start = file.read(len(POINTER))
        if start == POINTER:
            raise CheckpointError(f"{path} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`")
        try:
            with safe_open(path, "numpy"):  # checks the header, and that the tensors fill the file
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or cut short: {first_line(error)}; fetch it again") from error
        file.seek(0)
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header
