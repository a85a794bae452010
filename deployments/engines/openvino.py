"""Encoders on OpenVINO, which runs small batches on a CPU up to three times as fast as torch.

The torch model is traced and converted once, with its pooling and head. The graph is kept on disk, with fp16 weights
that are mapped into memory, so that replicas share them. In bf16 and int8 a layer packs its weights when it first runs
and never reads the mapped ones again. So one copy stays in memory: two bytes a weight, or one byte in int8.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import re
import shutil
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from deployments import disk_cache
from deployments.checkpoints.modules import contents
from deployments.engines.inputs import Arrays, Encoded, InputSpec
from deployments.engines.tokens import TextTokenizer

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # the import alone would call home

import openvino as ov  # noqa: E402
from openvino import opset13 as op  # noqa: E402

logger = logging.getLogger("ray.serve")

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}
STORED = {"fp32": "fp32", "bf16": "half", "int8": "int8"}
INT8_GROUP = 128
"""Activations that share a scale in int8. OpenVINO's default is 32; 128 ran 1.2 times as fast, as close to fp32."""
SMALL = 2**14
"""Weight matrices with fewer numbers than this are not quantised to int8."""
WIDTH = 4
"""Batch widths are multiples of this, to keep shapes few: a new one costs 4 to 9 ms of 45 for a batch of 30 pairs."""
WARM_LENGTHS = (1, 16)
MOST_BROKEN = 16
"""Failures after which every batch fails, so that the replica is replaced: each failure leaks memory."""
MADV_DONTNEED = 4


class Converted:
    """A model's graph at one precision, with its tokenizer and input spec, in the cache folder."""

    def __init__(self, folder: Path, output: str, precision: str) -> None:
        if precision not in HINTS:
            raise ValueError(f"it does not support {precision}, only {', '.join(HINTS)}")
        self.precision = precision
        name = disk_cache.key(output, contents(folder), disk_cache.versions(), disk_cache.code())
        self.folder = disk_cache.cache_folder() / f"openvino-{name}"
        self.path = self.folder / STORED[precision] / "model.xml"

    def exists(self) -> bool:
        return self.path.is_file()

    def input_spec(self, most_tokens: int) -> InputSpec:
        """The input spec, limited to `most_tokens`, as a model may have no limit of its own."""
        spec = InputSpec.read(self.path.with_name("inputs.json"))
        return replace(spec, max_tokens=min(spec.max_tokens, most_tokens))

    def tokenizer(self, spec: InputSpec) -> TextTokenizer:
        rust = tokenizers.Tokenizer.from_file(str(self.path.with_name("tokenizer.json")))
        return TextTokenizer(rust, spec)

    def save(self, model: ov.Model, spec: InputSpec, tokenizer: tokenizers.Tokenizer) -> None:
        """Write all files under another name, then move them into place, as several replicas may save at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=self.folder, suffix=".part"))
        try:
            ov.save_model(model, part / "model.xml", compress_to_fp16=self.precision != "fp32")
            spec.write(part / "inputs.json")
            tokenizer.save(str(part / "tokenizer.json"))
            os.rename(part, self.path.parent)
        except OSError:
            if not self.exists():
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def forget(self) -> None:
        shutil.rmtree(self.path.parent, ignore_errors=True)


class OpenVinoForward:
    """A compiled graph, which runs as many batches at once as there are threads, each on a thread of its own.

    A core that is busy elsewhere for a moment then delays one batch and not all. A batch on several threads would wait
    for the slowest at every layer.

    A graph that has failed once can't be trusted again: with one thread, OpenVINO swallows the error and from then on
    writes each batch's answer where the next one's belongs. So the graph is compiled again, and batches that ran on the
    old one meanwhile fail, too. The old graph is kept, as its thread may still write, and destroying it would end the
    process.
    """

    multiple = WIDTH

    def __init__(self, converted: Converted, spec: InputSpec, threads: int) -> None:
        self.parallel = threads
        self._core = ov.Core()
        self._path = converted.path
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[converted.precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            "ENABLE_CPU_PINNING": False,  # else several replicas would be pinned to the same first core
        }
        if converted.precision == "int8":
            self._settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = INT8_GROUP
        self._lock = threading.Lock()
        self._broken: list[Any] = []
        model = self._core.read_model(self._path)
        self.weights_bytes = _held_bytes(model, converted.precision)
        self._graph = self._compile(model)
        del model
        for length in WARM_LENGTHS:
            self(spec.batch([Encoded(np.zeros(min(length, spec.max_tokens), np.int64))], WIDTH))
        _let_go(self._path.with_suffix(".bin"))

    def __call__(self, batch: Arrays) -> np.ndarray:
        """Raises RuntimeError if the graph fails or its answer is not a number."""
        if len(self._broken) > MOST_BROKEN:
            raise RuntimeError(f"the graph has failed {len(self._broken)} times")
        graph = self._graph
        request = graph.requests.get()
        rows = np.full((len(batch["input_ids"]), graph.width), np.nan, np.float32)
        try:
            for name, array in batch.items():
                request.set_tensor(name, ov.Tensor(np.ascontiguousarray(array), shared_memory=True))
            request.set_output_tensor(0, ov.Tensor(rows, shared_memory=True))
            request.infer()
            if not np.isfinite(rows).all():
                raise RuntimeError("the model's answer is not a number")
        except Exception:
            self._replace(graph, request, rows)
            raise
        finally:
            graph.requests.put(request)
        if graph is not self._graph:
            raise RuntimeError("another batch broke the graph")
        return rows

    def _compile(self, model: ov.Model) -> CompiledGraph:
        compiled = self._core.compile_model(model, "CPU", self._settings)
        requests: queue.SimpleQueue[ov.InferRequest] = queue.SimpleQueue()
        for _ in range(self.parallel):
            requests.put(compiled.create_infer_request())
        return CompiledGraph(compiled, requests, int(compiled.output(0).partial_shape[1].get_length()))

    def _replace(self, graph: CompiledGraph, *in_use: Any) -> None:
        with self._lock:
            self._broken.append((graph, in_use))
            if graph is self._graph and len(self._broken) <= MOST_BROKEN:
                self._graph = self._compile(self._core.read_model(self._path))


@dataclass(frozen=True, eq=False)
class CompiledGraph:
    """A compiled graph, its requests, each of which runs one batch at a time, and the width of its rows."""

    compiled: ov.CompiledModel
    requests: queue.SimpleQueue[ov.InferRequest]
    width: int


def to_int8(model: ov.Model) -> ov.Model:
    """Replace the weights of linear layers and embedding tables by 8-bit integers with a scale per row."""
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or not node.get_element_type().is_real():
            continue
        targets = node.output(0).get_target_inputs()
        if len(node.shape) != 2 or np.prod(node.shape) < SMALL or not all(map(_takes_rows, targets)):
            continue
        weights = node.data.astype(np.float32)
        scale = np.maximum(np.abs(weights).max(axis=1, keepdims=True), 1e-8) / 127
        rounded = op.convert(op.constant(np.rint(weights / scale).astype(np.int8)), "f32")
        scaled = op.multiply(rounded, op.constant(scale.astype(np.float32)))
        for target in targets:
            target.replace_source_output(scaled.output(0))
    return model


def _takes_rows(target: Any) -> bool:
    """Whether a weight's rows are its outputs: the right side of a transposed product, or the table of a look-up."""
    node = target.get_node()
    if node.get_type_name() == "MatMul":
        return bool(target.get_index() == 1 and node.get_attributes()["transpose_b"])
    return bool(node.get_type_name() == "Gather" and target.get_index() == 0)


def _held_bytes(model: ov.Model, precision: str) -> int:
    """Bytes of weights in memory once all layers have run. In fp32 each is packed twice: for one row, and for more."""
    held = 0
    for node in model.get_ops():
        if node.get_type_name() == "Constant":
            users = [target.get_node().get_type_name() for target in node.output(0).get_target_inputs()]
            held += node.get_byte_size() * (2 if precision == "fp32" and "MatMul" in users else 1)
    return held


def _let_go(path: Path) -> None:
    """Drop a file's mapped pages from this process's memory. Pages still needed are loaded again when read."""
    if sys.platform != "linux":
        return
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith(str(path)) and (span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)):
            start, end = int(span[1], 16), int(span[2], 16)
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
