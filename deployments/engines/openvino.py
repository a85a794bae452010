"""Encoders on OpenVINO, which runs small batches on a CPU up to three times as fast as torch.

The torch model is traced and converted once, with its pooling and head; the graph is kept on disk, its weights as fp16.
They are mapped from there, so replicas share them. In bf16 and int8 a layer's weights are packed when it first runs and
its mapped ones are never read again: what stays in memory is one copy of two bytes (one byte in int8) a weight.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deployments import cache

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # the import alone would call home

import openvino as ov  # noqa: E402
from openvino import opset13 as op  # noqa: E402

logger = logging.getLogger("ray.serve")

SCHEME = 1
"""Of the graphs on disk; another number forgets them."""
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}
INT8_GROUP = 128
"""Activations that share a scale in int8. 32 is OpenVINO's own choice, 128 ran 1.2 times as fast, as near to fp32."""
SMALL = 2**14
"""Weights of fewer numbers than this stay as they are in int8."""
MADV_DONTNEED = 4


class Graph:
    """A model's converted graph at one precision, in the cache folder."""

    def __init__(self, folder: Path, precision: str) -> None:
        if precision not in HINTS:
            raise ValueError(f"it has no {precision}, only {', '.join(HINTS)}")
        self.precision = precision
        self.source = folder
        stored = {"fp32": "fp32", "bf16": "half", "int8": "int8"}[precision]
        name = cache.key(SCHEME, cache.files(folder), cache.versions())
        self.path = cache.cache_folder() / f"openvino-{name}" / stored / "model.xml"

    def exists(self) -> bool:
        return self.path.is_file()

    def read(self, core: ov.Core, rows: nn.Module, example: dict[str, np.ndarray]) -> ov.Model:
        """The graph from disk, made from `rows` where there is none to read. Inputs and output as `rows` has them."""
        if self.exists():
            try:
                return core.read_model(self.path)
            except RuntimeError as error:
                logger.warning("the converted model in %s is damaged, so it is made again: %s", self.path, error)
                shutil.rmtree(self.path.parent, ignore_errors=True)
        if self.precision == "int8":
            model = _to_int8(Graph(self.source, "bf16").read(core, rows, example))
        else:
            model = _convert(rows, example)
        self._save(model)
        return core.read_model(self.path)

    def _save(self, model: ov.Model) -> None:
        """Write the whole folder under another name and move it into place: replicas may do so at once."""
        self.path.parent.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=self.path.parent.parent, suffix=".part"))
        try:
            ov.save_model(model, part / "model.xml", compress_to_fp16=self.precision != "fp32")
            os.rename(part, self.path.parent)
        except OSError:
            if not self.exists():
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)


WIDTH = 4
"""OpenVINO prepares for each shape that it has not seen: 4 to 9 ms of 45 for a batch of 30 pairs. So few are used."""


class OpenVinoForward:
    """A compiled graph. One thread at a time may call it."""

    def __init__(
        self, graph: Graph, rows: nn.Module, example: dict[str, np.ndarray], longest: int, threads: int | None
    ) -> None:
        self.longest = longest
        core = ov.Core()
        model = graph.read(core, rows, example)
        self.weights_bytes = _held_bytes(model, graph.precision)
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[graph.precision],
            "INFERENCE_NUM_THREADS": threads or cache.cores(),
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # several replicas would be pinned to the same first core
        }
        if graph.precision == "int8":
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = INT8_GROUP
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()
        for length in (1, *example["input_ids"].shape[1:]):
            self({name: array[:, :length] for name, array in example.items()})
        _let_go(graph.path.with_suffix(".bin"))

    def __call__(self, features: dict[str, np.ndarray]) -> np.ndarray:
        rows: np.ndarray = self._request.infer(self._widened(features), share_inputs=True)[0]
        return rows

    def _widened(self, features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Padded on to a multiple of WIDTH tokens, unless that is more than the model takes."""
        width = features["input_ids"].shape[1]
        more = -width % WIDTH
        if not more or width + more > self.longest:
            return features
        return {name: np.pad(array, ((0, 0), (0, more))) for name, array in features.items()}


def _convert(rows: nn.Module, example: dict[str, np.ndarray]) -> ov.Model:
    """Trace `rows` with two texts of unlike length, so that masks are part of it; any batch and length may follow."""
    inputs = {name: torch.from_numpy(array) for name, array in example.items()}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every Python branch that tracing makes fixed
        return ov.convert_model(
            rows.float().eval(),
            example_input=inputs,
            input=[(name, ov.PartialShape([-1, -1]), ov.Type.i64) for name in inputs],
        )


def _to_int8(model: ov.Model) -> ov.Model:
    """Put 8-bit integers and a scale for each row in place of the weights of linear layers and embedding tables."""
    for node in model.get_ops():
        if node.get_type_name() != "Convert" or node.input_value(0).get_node().get_type_name() != "Constant":
            continue
        weights = node.input_value(0).get_node().data.astype(np.float32)
        if weights.ndim != 2 or weights.size < SMALL or not all(map(_takes_rows, node.output(0).get_target_inputs())):
            continue
        scale = np.maximum(np.abs(weights).max(axis=1, keepdims=True), 1e-8) / 127
        rounded = op.convert(op.constant(np.rint(weights / scale).astype(np.int8)), "f32")
        scaled = op.multiply(rounded, op.constant(scale.astype(np.float32)))
        for target in list(node.output(0).get_target_inputs()):
            target.replace_source_output(scaled.output(0))
    return model


def _takes_rows(target: Any) -> bool:
    """Whether a weight's rows are its outputs: a transposed product's right side, or the table of a look-up."""
    node = target.get_node()
    if node.get_type_name() == "MatMul":
        return bool(target.get_index() == 1 and node.get_attributes()["transpose_b"])
    return bool(node.get_type_name() == "Gather" and target.get_index() == 0)


def _held_bytes(model: ov.Model, precision: str) -> int:
    """Bytes of weights in memory once all has run: in fp32 layers are packed twice, for one row and for several."""
    held = 0
    for node in model.get_ops():
        if node.get_type_name() == "Constant":
            users = [target.get_node().get_type_name() for target in node.output(0).get_target_inputs()]
            held += node.get_byte_size() * (2 if precision == "fp32" and "MatMul" in users else 1)
    return held


def _let_go(path: Path) -> None:
    """Drop the mapped pages of a file from this process's memory; those still needed come back as they are read."""
    if sys.platform != "linux":
        return
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith(str(path)) and (span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)):
            start, end = int(span[1], 16), int(span[2], 16)
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
