"""Encoders from sentence-transformers: loads them, checks their limits, runs them in torch or converts them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling
from torch import nn

from deployments.checkpoints.loading import load_model
from deployments.checkpoints.modules import require_class
from deployments.engines.encoder import WARM_UP, Encoder, Output, TokenEncoder, Tokenizer
from deployments.engines.encoder_checks import check, check_tokenizer, plain_copy, probed
from deployments.engines.grouping import LONGEST, distance
from deployments.engines.inputs import DOCUMENT, QUERY, Arrays, Encoded, InputSpec, Prompts
from deployments.engines.limits import UNBOUNDED, positions, table_rows
from deployments.engines.reference import ReferenceEncoder, ReferenceTokenizer
from deployments.engines.tokens import TextTokenizer
from deployments.engines.torch_forward import Rows, TorchForward, is_causal
from deployments.load_progress import LoadProgress
from deployments.spec import CheckpointError, ModelSpec

TRIED_TOKENS = 1024
"""A model's limit is tested up to this length, which takes a second at most."""
COMPARED_LENGTHS = ((7,), (1, 30, 12), (4, 300), (9, LONGEST))
"""Text lengths of the batches on which a graph is compared: one text, mixed lengths, and beyond attention's window."""
FEW = 8
"""Tokens of a short input. Funnel takes no fewer than its pooling divides."""
CLOSE = 2e-3
"""Largest distance allowed between the graph's answers and torch's, as a fraction of their length. Both are in fp32."""
BATCHED = (Pooling, Dense, Normalize, Dropout, LayerNorm, LogitScore)
"""Modules that treat each row of a padded batch independently of the others."""


def load(output: Output, spec: ModelSpec, folder: Path, progress: LoadProgress, reason: str | None = None) -> Encoder:
    """Load the encoder in torch. `reason` says why torch replaces what was asked for. Raises CheckpointError."""
    progress.tokenizer()
    build = partial(_build, output, folder)
    model, facts = load_model(build, folder, spec.precision, progress, partial(probed, output))
    reasons = "; ".join(each for each in (reason, facts.fallback_reason) if each)
    facts = replace(facts, fallback_reason=reasons or None)
    check(model, output, folder)
    if not _runs_on_tokens(model):
        if output == "scores":
            raise CheckpointError(f"the cross-encoder in {folder} has modules or settings that are not supported")
        return ReferenceEncoder(model, facts, _prompts(model), spec.max_batch_tokens)
    forward = TorchForward(Rows(model, output))
    inputs = _input_spec(model, forward, folder)
    inputs = replace(inputs, max_tokens=min(inputs.max_tokens, spec.max_batch_tokens))
    # BigBird's attention in blocks ends for good at its first short input, so that comes before any other.
    forward(inputs.batch([_example(inputs, min(FEW, inputs.max_tokens), model.tokenizer.eos_token_id)]))
    return TokenEncoder(_tokenizer(model, inputs), inputs, forward, facts)


def convert(output: Output, folder: Path, precision: str, progress: LoadProgress) -> None:
    """Convert an encoder to a graph for OpenVINO. Raises ValueError if that is impossible, and CheckpointError."""
    from deployments.engines import openvino as ov

    progress.tokenizer()
    model, _ = load_model(partial(_build, output, folder), folder, "fp32", progress, partial(probed, output))
    check(model, output, folder)
    if not _runs_on_tokens(model):
        raise ValueError("its inputs are texts, which only sentence-transformers can tokenise")
    rows = Rows(model, output).float()
    inputs = _input_spec(model, TorchForward(rows), folder)
    tokenizer = _tokenizer(model, inputs)
    if not isinstance(tokenizer, TextTokenizer):
        raise ValueError("its inputs are built by a chat template")
    example = inputs.batch([tokenizer.encode(text, "a pair" if output == "scores" else None) for text in WARM_UP])
    graph = _traced(rows, example)
    _compare(graph, rows, inputs)
    ov.Converted(folder, output, precision).save(
        ov.to_int8(graph) if precision == "int8" else graph, inputs, tokenizer.rust
    )


def _build(output: Output, folder: Path, **model_kwargs: Any) -> Any:
    library = SentenceTransformer if output == "sentence_embedding" else CrossEncoder
    require_class(folder, library.__name__)
    return library(str(folder), device="cpu", model_kwargs=model_kwargs, local_files_only=True)


def _runs_on_tokens(model: Any) -> bool:
    """Whether items can be token ids, batched here. If not, sentence-transformers must be given texts."""
    encoder, *others = model
    if not isinstance(encoder, Transformer) or not {"text", "message"} & set(encoder.modality_config):
        return False
    if any(how["method"] != "forward" for how in encoder.modality_config.values()):  # towers, as CLIP has
        return False
    if table_rows(encoder.model) == UNBOUNDED:  # CANINE hashes characters and takes no single token
        return False
    if "message" not in encoder.modality_config and _has_own_lengths(encoder):
        return False
    weighted = any(
        isinstance(module, Pooling) and not module.include_prompt and "weightedmean" in module.pooling_mode
        for module in others
    )
    return all(isinstance(module, BATCHED) for module in others) and not (weighted and _prompts(model).all)


def _has_own_lengths(encoder: Transformer) -> bool:
    """Whether the checkpoint has settings of sentence-transformers for its texts, beside their greatest length."""
    named = {"text", "common"} & {name for name, given in encoder.processing_kwargs.items() if given}
    return bool(named or encoder.query_length or encoder.document_length or encoder.query_expansion)


def _prompts(model: Any) -> Prompts:
    """The prompts that sentence-transformers' `encode`, `encode_query`, `encode_document` or `predict` would choose."""
    texts: dict[str, str] = dict(model.prompts)
    default = texts.get(model.default_prompt_name or "", "")
    documents = [texts[name] for name in (DOCUMENT, "passage", "corpus") if name in texts]
    return Prompts(texts, default, {QUERY: texts.get(QUERY, default), DOCUMENT: [*documents, default][0]})


def _tokenizer(model: Any, spec: InputSpec) -> Tokenizer:
    rust = plain_copy(model.tokenizer)
    if rust is None or "message" in model[0].modality_config:
        return ReferenceTokenizer(model, spec, rust)
    return TextTokenizer(rust, spec)


def _input_spec(model: Any, forward: Callable[[Arrays], np.ndarray], folder: Path) -> InputSpec:
    """The limits and batch format. Raises CheckpointError if the tokenizer makes segments that the model lacks."""
    encoder, tokenizer = model[0].model, model.tokenizer
    rows = table_rows(encoder)
    check_tokenizer(tokenizer, rows, folder)
    prompts = _prompts(model)
    spec = InputSpec(
        max_tokens=int(min(tokenizer.model_max_length, positions(encoder), 2**31 - 1)),
        rows=rows,
        pad_id=tokenizer.pad_token_id or 0,
        pads_left=is_causal(model),
        segments="token_type_ids" in tokenizer.model_input_names,
        cuts_left=tokenizer.truncation_side == "left",
        splits_specials=tokenizer.split_special_tokens,
        prompts=prompts,
        unpooled={prompt: _prompt_tokens(model, prompt) for prompt in prompts.all if _leaves_out_prompts(model)},
    )
    return _tried(spec, forward, folder, tokenizer.eos_token_id)


def _leaves_out_prompts(model: Any) -> bool:
    return any(isinstance(module, Pooling) and not module.include_prompt for module in model)


def _prompt_tokens(model: Any, prompt: str) -> int:
    return int(model.preprocess([""], prompt=prompt).get("prompt_length") or 0)


def _tried(spec: InputSpec, forward: Callable[[Arrays], np.ndarray], folder: Path, end: int | None) -> InputSpec:
    """Lower `max_tokens` to what the model can run: its position table may be shorter than its config says.

    `end` is the token that ends a text.
    """

    def fails(tokens: int) -> bool:
        try:
            forward(spec.batch([_example(spec, tokens, end)]))
        except (IndexError, RuntimeError):
            return True
        return False

    limit = min(spec.max_tokens, TRIED_TOKENS)
    if spec.max_tokens > TRIED_TOKENS or not fails(limit):
        return spec
    low = 0
    while limit - low > 1:
        middle = (low + limit) // 2
        low, limit = (low, middle) if fails(middle) else (middle, limit)
    if not low:
        raise CheckpointError(f"the model in {folder} fails on a single token")
    return replace(spec, max_tokens=low)


def _example(spec: InputSpec, tokens: int, end: int | None) -> Encoded:
    """An item of this many tokens. It ends as texts do, because BART's heads look for that token."""
    id = next(id for id in range(spec.rows) if id != spec.pad_id)
    ids = np.full(tokens, id, np.int64)
    if end is not None and end < spec.rows and end != spec.pad_id:
        ids[-1] = end
    return Encoded(ids)


@torch.inference_mode()
def _compare(graph: Any, rows: Rows, spec: InputSpec) -> None:
    """Raises ValueError if the graph's answers differ from torch's on batches of other shapes than the traced one.

    Tracing keeps only the Python branches that the example took.
    """
    import openvino as ov

    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    draw = np.random.default_rng(0)
    for lengths in COMPARED_LENGTHS:
        batch = spec.batch(
            [Encoded(draw.integers(0, spec.rows, min(length, spec.max_tokens), np.int64)) for length in lengths]
        )
        expected = rows(**{name: torch.from_numpy(array) for name, array in batch.items()}).numpy()
        found = compiled(batch)[0]
        if not distance(found, expected) <= CLOSE:
            raise ValueError("the graph's answers differ from torch's")


def _traced(rows: nn.Module, example: Arrays) -> Any:
    """Trace `rows` on texts of different lengths, so that masks are included. The graph takes any batch and length."""
    import openvino as ov

    inputs = {name: torch.from_numpy(array) for name, array in example.items()}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every Python branch that tracing fixes
        return ov.convert_model(
            rows.eval(),
            example_input=inputs,
            input=[(name, ov.PartialShape([-1, -1]), ov.Type.i64) for name in inputs],
        )
