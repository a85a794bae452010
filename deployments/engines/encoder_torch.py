"""Encoders from sentence-transformers: loads them, checks their limits, runs them in torch or converts them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling
from sentence_transformers.util import batch_to_device
from torch import nn

from deployments.checkpoints.diagnosis import said
from deployments.checkpoints.loading import MACHINE_ERRORS, load_model
from deployments.checkpoints.modules import require_class
from deployments.engines.encoder import WARM_UP, Encoder, Output, TokenEncoder, Tokenizer
from deployments.engines.grouping import LONGEST, distance
from deployments.engines.inputs import DOCUMENT, QUERY, Arrays, Encoded, InputSpec, Prompts
from deployments.engines.limits import UNBOUNDED, positions, table_rows
from deployments.engines.reference import ReferenceEncoder, ReferenceTokenizer
from deployments.engines.tokens import TextTokenizer, frame_of_pairs
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
    model, facts = load_model(build, folder, spec.precision, progress, partial(_probed, output))
    reasons = "; ".join(each for each in (reason, facts.fallback_reason) if each)
    facts = replace(facts, fallback_reason=reasons or None)
    _check(model, output, folder)
    if not _runs_on_tokens(model):
        if output == "scores":
            raise CheckpointError(f"the cross-encoder in {folder} has modules or settings that are not supported")
        return ReferenceEncoder(model, facts, _prompts(model))
    forward = TorchForward(Rows(model, output))
    inputs = _input_spec(model, forward, folder)
    inputs = replace(inputs, max_tokens=min(inputs.max_tokens, spec.max_batch_tokens))
    # BigBird's attention in blocks ends for good at its first short input, so that comes before any other.
    forward(inputs.batch([Encoded(np.zeros(min(FEW, inputs.max_tokens), np.int64))]))
    return TokenEncoder(_tokenizer(model, inputs), inputs, forward, facts)


def convert(output: Output, folder: Path, precision: str, progress: LoadProgress) -> None:
    """Convert an encoder to a graph for OpenVINO. Raises ValueError if that is impossible, and CheckpointError."""
    from deployments.engines import openvino as ov

    progress.tokenizer()
    model, _ = load_model(partial(_build, output, folder), folder, "fp32", progress, partial(_probed, output))
    _check(model, output, folder)
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


@torch.inference_mode()
def _probed(output: Output, model: Any) -> torch.Tensor:
    text = WARM_UP[1]
    features = model.preprocess([text if output == "sentence_embedding" else (text, text)])
    found: torch.Tensor = model(batch_to_device(features, model.device))[output]
    return found


def _check(model: Any, output: Output, folder: Path) -> None:
    """Raises CheckpointError if the model in `folder` can't produce this output."""
    if output != "scores":
        return _check_runs(model, output, folder)
    if model.num_labels != 1:
        raise CheckpointError(
            f"a cross-encoder for rerank has one logit; the model in {folder} has {model.num_labels} (a classifier?)"
        )
    for module in model:
        if isinstance(module, LogitScore):
            yes, no, unknown = module.true_token_id, module.false_token_id, model.tokenizer.unk_token_id
            if yes == no or (unknown is not None and unknown in (yes, no)):
                raise CheckpointError(
                    "a language model for rerank answers with the tokens `yes` and `no`, which the one in "
                    f"{folder} does not have"
                )
    if isinstance(model[0], Transformer) and "token_type_ids" in model.tokenizer.model_input_names:
        _check_segments(model[0].model, model.tokenizer, folder)
    _check_runs(model, output, folder)


def _check_runs(model: Any, output: Output, folder: Path) -> None:
    """Raises CheckpointError if the modules can't run on an example, one after the other."""
    kinds = ", ".join(type(module).__name__ for module in model)
    try:
        _probed(output, model)
    except MACHINE_ERRORS:
        raise
    except Exception as error:  # modules raise whatever they meet when they do not fit together
        if isinstance(error, KeyError) and error.args == (output,):
            raise CheckpointError(
                f"the modules in {folder} ({kinds}) give no {output}; add what is missing to modules.json: after a "
                "Transformer, a Pooling"
            ) from error
        if any(isinstance(module, Router) and module.default_route is None for module in model):
            raise CheckpointError(
                f"the Router in {folder} has no default route for texts without an input type; name one of its routes "
                "as `default_route` in the `parameters` of router_config.json"
            ) from error
        raise CheckpointError(f"the modules in {folder} ({kinds}) do not run together: {said(error)}") from error


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
    rust = _private_copy(model.tokenizer)
    if rust is None or "message" in model[0].modality_config:
        return ReferenceTokenizer(model, spec, rust)
    return TextTokenizer(rust, spec)


def _private_copy(tokenizer: Any) -> tokenizers.Tokenizer | None:
    """A copy of the tokenizer's Rust part that neither truncates nor pads; None if there is no Rust part."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(rust, tokenizers.Tokenizer):
        return None
    copy = tokenizers.Tokenizer.from_str(rust.to_str())
    copy.no_padding()
    copy.no_truncation()
    copy.encode_special_tokens = tokenizer.split_special_tokens
    return copy


def _input_spec(model: Any, forward: Callable[[Arrays], np.ndarray], folder: Path) -> InputSpec:
    """The limits and batch format. Raises CheckpointError if the tokenizer makes segments that the model lacks."""
    encoder, tokenizer = model[0].model, model.tokenizer
    _check_vocabulary(tokenizer, folder)
    prompts = _prompts(model)
    spec = InputSpec(
        max_tokens=int(min(tokenizer.model_max_length, positions(encoder), 2**31 - 1)),
        rows=table_rows(encoder),
        pad_id=tokenizer.pad_token_id or 0,
        pads_left=is_causal(model),
        segments="token_type_ids" in tokenizer.model_input_names,
        cuts_left=tokenizer.truncation_side == "left",
        splits_specials=tokenizer.split_special_tokens,
        prompts=prompts,
        unpooled={prompt: _prompt_tokens(model, prompt) for prompt in prompts.all if _leaves_out_prompts(model)},
    )
    return _tried(spec, forward, folder, tokenizer.eos_token_id)


def _check_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Without its files, transformers makes a tokenizer for which every word is unknown."""
    rust = _private_copy(tokenizer)
    if rust and len(set(rust.get_vocab()) - set(tokenizer.all_special_tokens)) <= 1:
        raise CheckpointError(
            f"the tokenizer in {folder} knows no words, only special tokens; add the tokenizer.json, vocab.txt or "
            "*.model of the model"
        )


def _check_segments(encoder: nn.Module, tokenizer: Any, folder: Path) -> None:
    rust = _private_copy(tokenizer)
    table = next((m for name, m in encoder.named_modules() if name.endswith("token_type_embeddings")), None)
    if rust is None or not isinstance(table, nn.Embedding):
        return
    highest = frame_of_pairs(rust).highest_segment
    if highest >= table.num_embeddings:
        raise CheckpointError(
            f"the tokenizer in {folder} uses segments 0 to {highest} for pairs, but the model "
            f"({type(encoder).__name__}, type_vocab_size {table.num_embeddings}) has fewer: it was not made for pairs "
            "with this tokenizer"
        )


def _leaves_out_prompts(model: Any) -> bool:
    return any(isinstance(module, Pooling) and not module.include_prompt for module in model)


def _prompt_tokens(model: Any, prompt: str) -> int:
    return int(model.preprocess([""], prompt=prompt).get("prompt_length") or 0)


def _tried(spec: InputSpec, forward: Callable[[Arrays], np.ndarray], folder: Path, end: int | None) -> InputSpec:
    """Lower `max_tokens` to what the model can run: its position table may be shorter than its config says.

    `end` is the token that ends a text: BART's heads read its place.
    """
    id = next(id for id in range(spec.rows) if id != spec.pad_id)
    last = end if end is not None and end < spec.rows and end != spec.pad_id else id

    def fails(tokens: int) -> bool:
        ids = np.full(tokens, id, np.int64)
        ids[-1] = last
        try:
            forward(spec.batch([Encoded(ids)]))
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
