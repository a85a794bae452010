"""Shows that a model is read in steps as its own forward reads whole texts, and makes logits as that forward does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from deployments.spec import CheckpointError, first_line

KEEPS_MORE = "its layers keep a state that is not keys and values"
KEYS_AND_VALUES = {"full_attention", "sliding_attention"}
"""Kinds of layers that keep keys and values of the tokens they have read, and nothing else."""
PIECES = {
    "the prompt": slice(None, -4),
    "more of the prompt": slice(-4, -2),
    "a step": slice(-2, -1),
    "a further step": slice(-1, None),
}
"""How a text is read: the tokens of each pass."""
COMPARED = 2
"""Tokens at the end of each piece whose logits are compared."""
TAIL = 6
"""Tokens at the end of a text that hold all of those."""
APART = 2
"""Tokens at the end of a text in which it differs from others that begin alike."""
LENGTH = 20
"""Tokens of the two texts that begin alike. A third text is their beginning."""
BEYOND_WINDOW = 64
"""Tokens by which one more text is longer than a sliding window."""
LONGEST = 2048
"""Most tokens of that text. Wider windows are not tried, as the text would take too long to read."""
STRIDE = 7919
"""A prime, so that a text's tokens are from all of the vocabulary."""
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.15}
"""Largest distance between logits, as a share of their length (see `distance`)."""
ROUGH = 0.7
"""The same for models that rounding can change much: experts are chosen by narrow margins, and int8 layers of torch
round all tokens of a pass on one scale. Unrelated logits are 1.4 apart. Random models of 16 layers: up to 0.02 apart in
bf16 and 0.003 in fp16, but 0.2 with experts; up to 0.18 in int8, and 0.53 with experts.
"""


class NotInSteps(Exception):
    """Why a model can't be read in steps: a clause about the model."""


@contextmanager
def refused_if_it_fails(model: PreTrainedModel) -> Iterator[None]:
    """Turn what is raised into a CheckpointError that names the model's architecture, unless memory is short."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a forward that was not made for this may raise anything
        if "can't allocate memory" in str(error):  # torch on a CPU
            raise
        reason = str(error) if isinstance(error, NotInSteps) else f"its forward fails ({first_line(error)})"
        raise CheckpointError(f"{type(model).__name__} can't be read in steps: {reason}") from error


def require_steps(decoder: PreTrainedModel) -> None:
    """Raises NotInSteps if the decoder's class or config says that it can't be read in steps."""
    others = sorted(set(getattr(decoder.config, "layer_types", None) or ()) - KEYS_AND_VALUES)
    attention = [kind for kind in others if kind.endswith("attention") and kind != "linear_attention"]
    if decoder._is_stateful or len(attention) < len(others):
        raise NotInSteps(KEEPS_MORE)
    if attention:
        raise NotInSteps(f"its layers use {attention[0]}, and only full and sliding attention are known")
    if not decoder._supports_attention_backend:
        raise NotInSteps("it has its own attention implementation")


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of the model that reads tokens and returns hidden states."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def head_of(model: PreTrainedModel, decoder: PreTrainedModel) -> PreTrainedModel:
    """A model that makes logits as `model` does, of the decoder's last hidden states passed as `inputs_embeds`.

    It shares all weights with `model`.
    """
    path = next(name for name, module in model.named_modules() if module is decoder)
    *above, last = path.split(".")
    head = parent = _shallow(model)
    for name in above:
        child = _shallow(parent.get_submodule(name))
        setattr(parent, name, child)
        parent = child
    setattr(parent, last, _Given())
    return head


def _shallow(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    twin.__dict__.pop("forward", None)  # accelerate's, which is bound to the original
    return twin


class _Output(BaseModelOutputWithPast):  # type: ignore[misc]
    def __getattr__(self, _: str) -> None:
        """Some heads pass on what only their own decoder returns."""


class _Given(nn.Module):
    """Stands in for a decoder whose hidden states are known."""

    def forward(self, *_: object, inputs_embeds: torch.Tensor, **__: object) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)


@dataclass(frozen=True)
class Trial:
    """Some texts and the logits that a model's own forward gives for them."""

    texts: list[torch.Tensor]
    """Ids, each of shape (texts, tokens). Texts of one tensor differ in their last APART tokens."""
    own: list[torch.Tensor]
    """Logits after the last TAIL tokens, each of shape (texts, TAIL, vocabulary)."""
    tolerance: float

    @classmethod
    def of(cls, model: PreTrainedModel, decoder: PreTrainedModel, limit: int, device: torch.device) -> Trial:
        """Run the model's own forward on texts of up to `limit` tokens. One is longer than a sliding window."""
        if limit < TAIL:
            raise NotInSteps(f"it has only {limit} positions")
        decoder.set_attn_implementation("sdpa" if decoder._supports_sdpa else "eager")
        embeddings = model.get_input_embeddings().weight
        tolerance = ROUGH if _is_rough(model, embeddings.dtype) else TOLERANCES[embeddings.dtype]
        left_out = {decoder.config.pad_token_id, getattr(model.config, "image_token_id", None)}
        ids = torch.tensor([id for id in range(len(embeddings)) if id not in left_out])
        pair = _texts(ids, 2, min(LENGTH, limit))
        rows = torch.cat([torch.arange(TAIL), torch.arange(-TAIL, 0) + pair.shape[1]])
        own = _logits(model, pair.to(device), rows.to(device))
        texts, logits = [pair[:1, :TAIL], pair], [own[:1, :TAIL], own[:, TAIL:]]
        if window := _window(decoder):
            texts.append(_texts(ids, 1, min(window + BEYOND_WINDOW, LONGEST, limit)))
            logits.append(_logits(model, texts[-1].to(device), TAIL))
        return cls(texts, logits, tolerance)

    def turn(self, text: int, piece: str) -> tuple[list[int], list[int], np.ndarray | None]:
        """Ids of a piece, their positions, and which tokens each attends to (see `Turn`)."""
        texts = self.texts[text]
        count, length = texts.shape
        places = range(length)[PIECES[piece]]
        shared = length - APART
        if count == 1 or places[0] < shared:
            return texts[0, PIECES[piece]].tolist(), list(places), None
        visible = np.hstack([np.ones((count, shared)), *[np.eye(count)] * (places[0] - shared + 1)])
        return texts[:, places[0]].tolist(), [places[0]] * count, visible.astype(bool)

    def require_same(self, text: int, piece: str, logits: torch.Tensor) -> None:
        """Raises NotInSteps if logits, shape (tokens, vocabulary), are not those of the own forward.

        They are the logits after a piece of a text, or after the last COMPARED tokens of it. Of texts that differ in
        that piece, there is a row for each.
        """
        own = self.own[text][:, PIECES[piece]].flatten(0, 1)[: len(logits)]
        apart = distance(logits, own.to(logits.device))
        if not apart <= self.tolerance:  # it may be NaN
            raise NotInSteps(
                f"after {piece}, in a text of {self.texts[text].shape[1]} tokens, its logits differ by {apart:.2%} "
                "from those of its own forward"
            )


def _texts(ids: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Texts of these ids that differ in their last APART tokens, shape (count, length)."""
    shared = length - APART
    text = ids[torch.arange(shared + count * APART) * STRIDE % len(ids)]
    return torch.hstack([text[:shared].repeat(count, 1), text[shared:].view(count, APART)])


def _logits(model: PreTrainedModel, ids: torch.Tensor, rows: torch.Tensor | int) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=rows).logits
    return logits.float()


def distance(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Length of the difference as a share of the others' length, both without their means, which change no choice."""
    logits, others = (each - each.mean(-1, keepdim=True) for each in (logits, others))
    return float((logits - others).norm() / others.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _window(decoder: PreTrainedModel) -> int | None:
    """Tokens of the decoder's sliding window, if it has one that is not too wide to try."""
    kinds = getattr(decoder.config, "layer_types", None) or ["sliding_attention"]
    window: int | None = getattr(decoder.config, "sliding_window", None)
    return window if window and window + TAIL <= LONGEST and "sliding_attention" in kinds else None


def _is_rough(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    config = model.config.get_text_config(decoder=True)
    if dtype != torch.float32 and getattr(config, "num_experts_per_tok", None):
        return True
    dynamic = any(type(module).__module__.startswith("torch.ao.nn.quantized") for module in model.modules())
    return dynamic or bool(getattr(model, "is_quantized", False))
