"""Reading tokens of many sequences in one pass, without padding.

All matrix multiplications of a pass run over the tokens of all sequences together. Only attention is worked out
sequence by sequence, from keys and values that each keeps for itself: so sequences of any lengths, some at their
first token and some at their last, share a pass, and may join and leave between passes.

On a CPU attention is worked out in fp32 whatever the model's precision is: for a single token after 900 others, with
20 heads of 64, torch took 1.15 ms in bf16 and 0.55 in fp32, and for many tokens about the same in both.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from deployments.checkpoints.loading import device
from deployments.spec import CheckpointError

ATTENTION = "dure_sequences"
ROOM = 64
"""Tokens that a sequence has room for beyond those it has just read."""
MAPPED_BYTES = 32 * 2**10
"""On a CPU what is kept is memory of its own from here on: it lives longer than activations, and among them in the heap
it leaves holes. Next words at KoGPT2's size, 64 clients for a minute: 1.79 to 1.91 GB became 1.55 to 1.80."""


class Sequence:
    """Keys and values of the tokens that were read so far, in the order in which they were read.

    Each layer keeps its own, where it works: a model may be spread over several devices.
    """

    def __init__(self) -> None:
        self.length = 0
        self.kept: list[torch.Tensor] = []
        """Of each layer that has read anything, shape (2, heads, room, width)."""

    def of_layer(self, layer: int, like: torch.Tensor, tokens: int) -> torch.Tensor:
        """What a layer keeps, with room for so many tokens more; `like` are keys, shape (heads, tokens, width)."""
        if layer == len(self.kept):
            self.kept.append(like.new_empty(2, like.shape[0], 0, like.shape[2]))
        kept = self.kept[layer]
        if self.length + tokens > kept.shape[2]:
            larger = _empty(kept, 2, kept.shape[1], self.length + tokens + ROOM, kept.shape[3])
            larger[:, :, : self.length] = kept[:, :, : self.length]
            self.kept[layer] = kept = larger
        return kept

    def copy_of_first(self, tokens: int) -> Sequence:
        """A sequence that has read this one's first tokens."""
        copy = Sequence()
        copy.length = tokens
        firsts = [kept[:, :, :tokens] for kept in self.kept]
        copy.kept = [_empty(first, *first.shape).copy_(first) for first in firsts]
        return copy

    def nbytes(self, tokens: int) -> int:
        """Of its first tokens."""
        return sum(kept[:, :, :tokens].nbytes for kept in self.kept)


@dataclass(frozen=True)
class Turn:
    """What one sequence reads in a pass."""

    sequence: Sequence
    ids: list[int]
    positions: list[int]
    visible: np.ndarray | None = None
    """Which tokens of the sequence, these included, each of these sees: bool, shape (ids, length + ids). None: all
    that come before it, and itself."""
    embeddings: torch.Tensor | None = None
    """What is read in the place of the ids' own embeddings, shape (ids, width)."""


@dataclass(frozen=True)
class Span:
    """A turn's place among the tokens of a pass."""

    begin: int
    end: int
    sequence: Sequence
    bias: torch.Tensor | None
    """What is added to the scores of attention, shape (tokens, tokens of the sequence); None: nothing."""


class Reader:
    """Reads turns with a causal language model of transformers that takes its attention from AttentionInterface.

    Raises CheckpointError for one that does not.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not model._supports_attention_backend:
            raise CheckpointError(f"{type(model).__name__} has an attention of its own, which can't be read in steps")
        self.model = model
        self.device = device()  # not the model's: of one that is spread, that may be the disk
        model.set_attn_implementation(ATTENTION)

    def read(self, turns: Sequence_[Turn]) -> torch.Tensor:
        """The last hidden state of each token of the turns, in order: shape (tokens, width).

        The sequences hold what was read, but grow by it only when their `length` is told so.
        """
        spans, begin = [], 0
        for turn in turns:
            spans.append(Span(begin, begin + len(turn.ids), turn.sequence, self._bias(turn)))
            begin += len(turn.ids)
        hidden: torch.Tensor = self.model.base_model(
            inputs_embeds=torch.cat([self._embeddings(turn) for turn in turns])[None],
            position_ids=torch.tensor([[at for turn in turns for at in turn.positions]], device=self.device),
            use_cache=False,
            spans=spans,
        ).last_hidden_state[0]
        return hidden

    def _embeddings(self, turn: Turn) -> torch.Tensor:
        if turn.embeddings is not None:
            return turn.embeddings
        embeddings: torch.Tensor = self.model.get_input_embeddings()(torch.tensor(turn.ids, device=self.device))
        return embeddings

    def _bias(self, turn: Turn) -> torch.Tensor | None:
        visible = turn.visible
        if visible is None:
            if len(turn.ids) == 1 or turn.sequence.length == 0:
                return None
            visible = np.tri(len(turn.ids), turn.sequence.length + len(turn.ids), turn.sequence.length, bool)
        dtype = _dtype(self.model.get_input_embeddings().weight)  # never quantised
        bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~torch.from_numpy(visible), torch.finfo(dtype).min)
        return bias.to(self.device)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    spans: list[Span],
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface; query, key and value have shape (1, heads, tokens, width)."""
    if more.get("softcap") or more.get("s_aux") is not None:
        raise CheckpointError(f"{type(module).__name__} caps its scores or has sinks, which can't be read in steps")
    result = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
    query, key, value = (each.to(_dtype(each)) for each in (query, key, value))
    gqa = query.shape[1] != key.shape[1]
    for span in spans:
        begin, end, length = span.begin, span.end, span.sequence.length
        kept = span.sequence.of_layer(module.layer_idx, key[0], end - begin)
        kept[0, :, length : length + end - begin] = key[0, :, begin:end]
        kept[1, :, length : length + end - begin] = value[0, :, begin:end]
        keys, values = kept[:, None, :, : length + end - begin]
        result[:, begin:end] = scaled_dot_product_attention(
            query[:, :, begin:end],
            keys,
            values,
            attn_mask=None if span.bias is None else span.bias.to(query.device),
            is_causal=span.bias is None and end - begin > 1,
            scale=scaling,
            enable_gqa=gqa,
        ).transpose(1, 2)
    return result, None


def _empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Of the same type and on the same device. Raises MemoryError, or torch's error on a GPU, for want of memory."""
    nbytes = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or nbytes < MAPPED_BYTES:
        return like.new_empty(shape)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {nbytes} bytes for keys and values") from error
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def _dtype(tensor: torch.Tensor) -> torch.dtype:
    """In which attention is worked out for such tensors."""
    return torch.float32 if tensor.device.type == "cpu" else tensor.dtype


AttentionInterface.register(ATTENTION, _attend)
