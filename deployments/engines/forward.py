"""The pass through an encoder that the embedder and the reranker share, in torch or on OpenVINO."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from deployments.engines.tokens import Encoded, Encoder, pad_rows
from deployments.loading import device, load_model, plain_precision
from deployments.progress import LoadProgress
from deployments.spec import CheckpointError, Facts, ModelSpec

logger = logging.getLogger("ray.serve")

Arrays = dict[str, np.ndarray]
WARM_UP = ("warm", "warm up " * 16)


class Forward(Protocol):
    def __call__(self, features: Arrays) -> np.ndarray:
        """Padded model inputs, int64 of shape (items, tokens), to a float32 row for each item."""


class Runner:
    """A sentence-transformers model without its `encode`: texts to token ids, batches of those to rows."""

    def __init__(self, model: Any, forward: Forward, facts: Facts) -> None:
        self.facts = facts
        self.forward = forward
        self.encoder = Encoder(model.tokenizer, model.max_seq_length or 512)
        self.prompt: str = default_prompt(model)
        self._pad_id: int = model.tokenizer.pad_token_id or 0
        self._segments = "token_type_ids" in model.tokenizer.model_input_names

    def rows(self, items: list[Encoded]) -> np.ndarray:
        """float32, shape (items, width)."""
        return self.forward(pad_rows(items, self._pad_id, self._segments))

    def features(self, texts: Iterable[str]) -> Arrays:
        """What `forward` takes, for these texts."""
        return pad_rows([self.encoder.encode(text) for text in texts], self._pad_id, self._segments)


class TorchForward:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def __call__(self, features: Arrays) -> np.ndarray:
        rows = self.model(**{name: torch.from_numpy(array).to(self.device) for name, array in features.items()})
        array: np.ndarray = rows.float().cpu().numpy()
        return array


class Rows(nn.Module):
    """All modules of a sentence-transformers model, from padded ids to the rows named `output`."""

    def __init__(self, model: Any, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self.fixed: dict[str, Any] = {}
        if prompt := default_prompt(model):  # some poolings leave it out
            self.fixed["prompt_length"] = model.preprocess([""], prompt=prompt).get("prompt_length")

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        features = self.fixed | {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            features["token_type_ids"] = token_type_ids
        rows: torch.Tensor = self.model(features)[self.output]
        return rows


def default_prompt(model: Any) -> str:
    """What an embedding model wants before every text."""
    if not isinstance(model, SentenceTransformer) or not model.default_prompt_name:
        return ""
    return model.prompts.get(model.default_prompt_name) or ""


def load_runner(
    build: Callable[..., Any], output: str, spec: ModelSpec, folder: Path, progress: LoadProgress
) -> Runner:
    """Load what `build(dtype=...)` loads and run it as the spec says; `output` names its feature with the rows.

    Where OpenVINO can't run it torch does, and the reason is in the facts.
    """
    reason = None
    if spec.runtime == "openvino":
        try:
            return _on_openvino(build, output, spec, folder, progress)
        except CheckpointError:
            raise
        except Exception as error:  # whatever OpenVINO trips over, the model is still wanted
            reason = f"OpenVINO failed ({type(error).__name__}: {str(error)[:300]}), so torch runs it"
            logger.warning(reason)
    model, facts = load_model(build, folder, spec.precision, progress)
    reasons = "; ".join(each for each in (reason, facts.fallback_reason) if each)
    return Runner(model, TorchForward(Rows(model, output)), replace(facts, fallback_reason=reasons or None))


def _on_openvino(
    build: Callable[..., Any], output: str, spec: ModelSpec, folder: Path, progress: LoadProgress
) -> Runner:
    from deployments.engines import openvino

    if device().type != "cpu":
        raise ValueError("it runs on CPUs only")
    precision = plain_precision() if spec.precision == "auto" else spec.precision
    graph = openvino.Graph(folder, precision)
    model, facts = load_model(build, folder, "bf16" if graph.exists() else "fp32", progress)
    rows = Rows(model, output)
    runner = Runner(model, TorchForward(rows), facts)
    forward = openvino.OpenVinoForward(graph, rows, runner.features(WARM_UP), runner.encoder.max_tokens, spec.threads)
    runner.forward = forward
    runner.facts = Facts("cpu", precision, precision == "int8", forward.weights_bytes, None, "openvino")
    return runner
