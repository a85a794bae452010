"""Encoders for the embedder and the reranker: from texts to items, and from batches of items to rows of numbers.

An encoder on OpenVINO needs only its graph, its tokenizer and its input spec, all read from disk. So torch,
transformers and sentence-transformers, 700 MB of memory, stay out of the replica's process. If the three files are not
on disk yet, a separate process makes them.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from deployments import aside, disk_cache
from deployments.engines.grouping import LONGEST, batches_of, in_groups
from deployments.engines.inputs import Arrays, Encoded, InputSpec, Prompts
from deployments.engines.tokens import TextTokenizer, too_long
from deployments.load_progress import LoadProgress
from deployments.messages import InputType
from deployments.spec import CheckpointError, Facts, ItemError, ModelSpec, first_line

if TYPE_CHECKING:
    from deployments.engines.openvino import Converted

logger = logging.getLogger("ray.serve")

Output = Literal["sentence_embedding", "scores"]
"""What the rows are, in sentence-transformers' terms: vectors of texts, or logits of pairs."""
WARM_UP = ("warm", "warm up " * 16)


class Encoder(Protocol):
    """A loaded encoder. Any number of threads may call `prepare` at once, and `parallel` threads may call `rows`."""

    facts: Facts
    prompts: Prompts
    parallel: int
    max_tokens: int
    """Most tokens of one item."""

    def prepare(
        self,
        text: str,
        pair: str | None = None,
        truncate: bool = True,
        prompt: str = "",
        input_type: InputType | None = None,
    ) -> Any:
        """Turn a text or a pair into an item. Raises ItemError for a text that the model can't take."""

    def prepare_ids(self, ids: list[int], truncate: bool = True) -> Any:
        """Turn ids of the model's tokenizer into an item. Raises ItemError for unknown or too many ids."""

    def tokens(self, item: Any) -> int:
        """Tokens of the item."""

    def rows(self, items: list[Any]) -> np.ndarray:
        """Run items in batches that do not change their answers; returns float32, shape (items, width)."""

    def run_together(self, items: list[Any]) -> np.ndarray:
        """Run items in one batch, padded to the longest and no further; returns float32, shape (items, width)."""


class Tokenizer(Protocol):
    """Turns texts into token ids. Several threads may call it at once."""

    def encode(self, text: str, pair: str | None = None, truncate: bool = True) -> Encoded:
        """Raises ItemError for a text that the model can't take."""


class Forward(Protocol):
    """A pass through the model."""

    parallel: int
    """Threads that may call it at once."""
    multiple: int
    """Batch widths should be multiples of this."""

    def __call__(self, batch: Arrays) -> np.ndarray:
        """Turn model inputs of shape (items, tokens) into one float32 row per item."""


class TokenEncoder:
    """An encoder whose items are token ids, which it pads into batches."""

    def __init__(self, tokenizer: Tokenizer, spec: InputSpec, forward: Forward, facts: Facts) -> None:
        self.tokenizer = tokenizer
        self.spec = spec
        self.forward = forward
        self.facts = facts
        self.prompts = spec.prompts
        self.parallel = forward.parallel
        self.max_tokens = spec.max_tokens

    def prepare(
        self,
        text: str,
        pair: str | None = None,
        truncate: bool = True,
        prompt: str = "",
        input_type: InputType | None = None,
    ) -> Encoded:
        encoded = self.tokenizer.encode(prompt + text, pair, truncate)
        return encoded.after_prompt(self.spec.unpooled.get(prompt, 0))

    def prepare_ids(self, ids: list[int], truncate: bool = True) -> Encoded:
        wrong = next((id for id in ids if not 0 <= id < self.spec.rows), None)
        if wrong is not None:
            raise ItemError(f"token id {wrong} is not among the model's {self.spec.rows}")
        if len(ids) > self.spec.max_tokens and not truncate:
            raise too_long(self.spec.max_tokens)
        return Encoded(np.array(ids[: self.spec.max_tokens], np.int64))

    def tokens(self, item: Encoded) -> int:
        return len(item.ids)

    def rows(self, items: list[Encoded]) -> np.ndarray:
        if self.facts.batches == "mixed" and max(map(self.tokens, items)) <= LONGEST:
            return self.forward(self.spec.batch(items, self.forward.multiple))
        return in_groups(items, self.facts.batches, self.tokens, self.run_together)

    def run_together(self, items: list[Encoded]) -> np.ndarray:
        return self.forward(self.spec.batch(items))


def load_encoder(output: Output, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Encoder:
    """Load the encoder in `folder` as the spec says. If OpenVINO can't run it, torch does, and the facts say why.

    The facts also say which items may share a batch, so that no answer depends on the others.

    Raises CheckpointError if the checkpoint is damaged, incomplete, or has no model for this output.
    """
    encoder = _loaded(output, spec, folder, progress)
    if isinstance(encoder, TokenEncoder) and isinstance(encoder.tokenizer, TextTokenizer):
        fewest = encoder.tokenizer.fewest(1 if output == "sentence_embedding" else 2)
        if encoder.max_tokens < fewest:
            raise CheckpointError(
                f"the model in {folder} takes {encoder.max_tokens} tokens and needs {fewest} with its special tokens; "
                "raise max_batch_tokens in the config, or max_seq_length (model_max_length) of the checkpoint"
            )
    encoder.facts = replace(encoder.facts, batches=batches_of(encoder, output, folder))
    return encoder


def _loaded(output: Output, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Encoder:
    reason = None
    if spec.runtime == "openvino":
        try:
            return _on_openvino(output, spec, folder, progress)
        except CheckpointError:
            raise
        except Exception as error:  # whatever goes wrong in OpenVINO, torch can still serve the model
            reason = f"OpenVINO failed ({first_line(error)[:300]}), so torch runs it"
            logger.warning(reason)
    from deployments.engines import encoder_torch

    return encoder_torch.load(output, spec, folder, progress, reason)


def _on_openvino(output: Output, spec: ModelSpec, folder: Path, progress: LoadProgress) -> TokenEncoder:
    from deployments.engines.openvino import Converted

    if spec.gpu_share:
        raise ValueError("it runs on CPUs only")
    precision = (disk_cache.half_precision() or "fp32") if spec.precision == "auto" else spec.precision
    converted = Converted(folder, output, precision)
    if converted.exists():
        try:
            return _read(converted, spec, progress)
        except Exception as error:
            logger.warning("the converted model in %s is damaged and will be made again: %s", converted.folder, error)
            converted.forget()
    aside.run("deployments.engines.encoder_torch:convert", output, folder, precision, progress=progress)
    return _read(converted, spec, progress)


def _read(converted: Converted, spec: ModelSpec, progress: LoadProgress) -> TokenEncoder:
    from deployments.engines.openvino import OpenVinoForward

    progress.tokenizer()
    inputs = converted.input_spec(spec.max_batch_tokens)
    tokenizer = converted.tokenizer(inputs)
    progress.checkpoint(0, 0, 1)
    forward = OpenVinoForward(converted, inputs, spec.threads or disk_cache.cores())
    progress.checkpoint(100, 1, 1)
    quantised = converted.precision == "int8"
    facts = Facts("cpu", converted.precision, quantised, forward.weights_bytes, None, "openvino")
    return TokenEncoder(tokenizer, inputs, forward, facts)
