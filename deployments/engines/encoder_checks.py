"""Checks a loaded encoder: that its modules and its tokenizer can do what the task needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.util import batch_to_device
from torch import nn

from deployments.checkpoints.diagnosis import said
from deployments.checkpoints.loading import MACHINE_ERRORS
from deployments.engines.encoder import WARM_UP, Output
from deployments.engines.tokens import frame_of_pairs
from deployments.spec import CheckpointError


def check(model: Any, output: Output, folder: Path) -> None:
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
        probed(output, model)
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


def check_tokenizer(tokenizer: Any, rows: int, folder: Path) -> None:
    """Raises CheckpointError for a tokenizer that knows no words or pads with a token beyond the embedding's `rows`.

    Without its files, transformers makes a tokenizer for which every word is unknown.
    """
    rust = plain_copy(tokenizer)
    if rust and len(set(rust.get_vocab()) - set(tokenizer.all_special_tokens)) <= 1:
        raise CheckpointError(
            f"the tokenizer in {folder} knows no words, only special tokens; add the tokenizer.json, vocab.txt or "
            "*.model of the model"
        )
    if (tokenizer.pad_token_id or 0) >= rows:
        raise CheckpointError(
            f"the padding token {tokenizer.pad_token!r} of the tokenizer in {folder} has id {tokenizer.pad_token_id}, "
            f"for which the checkpoint has no embedding: there are {rows}; choose another pad_token in "
            "tokenizer_config.json"
        )


def plain_copy(tokenizer: Any) -> tokenizers.Tokenizer | None:
    """A copy of the tokenizer's Rust part that neither truncates nor pads; None if there is no Rust part."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(rust, tokenizers.Tokenizer):
        return None
    copy = tokenizers.Tokenizer.from_str(rust.to_str())
    copy.no_padding()
    copy.no_truncation()
    copy.encode_special_tokens = tokenizer.split_special_tokens
    return copy


@torch.inference_mode()
def probed(output: Output, model: Any) -> torch.Tensor:
    """The model's answer for an example."""
    text = WARM_UP[1]
    features = model.preprocess([text if output == "sentence_embedding" else (text, text)])
    found: torch.Tensor = model(batch_to_device(features, model.device))[output]
    return found


def _check_segments(encoder: nn.Module, tokenizer: Any, folder: Path) -> None:
    rust = plain_copy(tokenizer)
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
