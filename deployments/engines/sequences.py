"""Reading tokens of many sequences in one pass, without padding.

All matrix multiplications of a pass run over the tokens of all sequences together. Only attention is worked out
sequence by sequence, from keys and values that each keeps for itself: so sequences of any lengths, some at their
first token and some at their last, share a pass, and may join and leave between passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from deployments.spec import CheckpointError

ATTENTION = "dure_sequences"
ROOM = 64
"""Tokens that a sequence has room for beyond those it has just read."""


class Sequence:
    """Keys and values of the tokens that were read so far, in the order in which they were read."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.length = 0
        like = model.get_input_embeddings().weight  # never quantised
        self.kept = like.new_empty(config.num_hidden_layers, 2, heads, 0, width)
        """Shape (layers, 2, heads, room, width)."""

    def make_room(self, tokens: int) -> None:
        """For so many tokens more than there are."""
        room = self.kept.shape[3]
        if self.length + tokens > room:
            layers, two, heads, _, width = self.kept.shape
            kept = self.kept.new_empty(layers, two, heads, self.length + tokens + ROOM, width)
            kept[:, :, :, : self.length] = self.kept[:, :, :, : self.length]
            self.kept = kept

    def copy_of_first(self, tokens: int) -> Sequence:
        """A sequence that has read this one's first tokens."""
        copy = Sequence.__new__(Sequence)
        copy.length = tokens
        copy.kept = self.kept[:, :, :, :tokens].clone()
        return copy

    @property
    def nbytes(self) -> int:
        return int(self.kept.nbytes)


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
        model.set_attn_implementation(ATTENTION)

    def read(self, turns: list[Turn]) -> torch.Tensor:
        """The last hidden state of each token of the turns, in order: shape (tokens, width).

        The sequences hold what was read, but grow by it only when their `length` is told so.
        """
        spans, begin = [], 0
        for turn in turns:
            turn.sequence.make_room(len(turn.ids))
            spans.append(Span(begin, begin + len(turn.ids), turn.sequence, self._bias(turn)))
            begin += len(turn.ids)
        device = self.model.device
        hidden: torch.Tensor = self.model.base_model(
            inputs_embeds=torch.cat([self._embeddings(turn) for turn in turns])[None],
            position_ids=torch.tensor([[at for turn in turns for at in turn.positions]], device=device),
            use_cache=False,
            spans=spans,
        ).last_hidden_state[0]
        return hidden

    def _embeddings(self, turn: Turn) -> torch.Tensor:
        if turn.embeddings is not None:
            return turn.embeddings
        embeddings: torch.Tensor = self.model.get_input_embeddings()(torch.tensor(turn.ids, device=self.model.device))
        return embeddings

    def _bias(self, turn: Turn) -> torch.Tensor | None:
        visible = turn.visible
        if visible is None:
            if len(turn.ids) == 1 or turn.sequence.length == 0:
                return None
            visible = np.tri(len(turn.ids), turn.sequence.length + len(turn.ids), turn.sequence.length, bool)
        dtype = turn.sequence.kept.dtype
        bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~torch.from_numpy(visible), torch.finfo(dtype).min)
        return bias.to(self.model.device)


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
    gqa = query.shape[1] != key.shape[1]
    for span in spans:
        begin, end, length = span.begin, span.end, span.sequence.length
        keys, values = span.sequence.kept[module.layer_idx, :, None, :, : length + end - begin]
        keys[0, :, length:] = key[0, :, begin:end]
        values[0, :, length:] = value[0, :, begin:end]
        result[:, begin:end] = scaled_dot_product_attention(
            query[:, :, begin:end],
            keys,
            values,
            attn_mask=span.bias,
            is_causal=span.bias is None and end - begin > 1,
            scale=scaling,
            enable_gqa=gqa,
        ).transpose(1, 2)
    return result, None


AttentionInterface.register(ATTENTION, _attend)
