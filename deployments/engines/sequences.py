"""Reads tokens of many sequences in one pass, without padding.

All matrix multiplications of a pass run over the tokens of all sequences together. Only attention runs sequence by
sequence, on keys and values that each sequence keeps for itself. So sequences of any lengths, some at their first token
and some at their last, share a pass, and may join and leave between passes.

On a CPU, attention runs in fp32 whatever the model's precision is. For a single token after 900 others, with 20 heads
of 64, torch took 1.15 ms in bf16 and 0.55 ms in fp32; for many tokens both took about the same.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel

from deployments.checkpoints.loading import device
from deployments.engines.attention import attend, bias_of
from deployments.engines.limits import first_position, max_tokens
from deployments.engines.own_forward import (
    COMPARED,
    KEEPS_MORE,
    PIECES,
    NotInSteps,
    Trial,
    decoder_of,
    head_of,
    refused_if_it_fails,
    require_steps,
)

ATTENTION = "dure_sequences"
ROOM = 64
"""Spare tokens that a sequence allocates whenever it grows."""
MAPPED_BYTES = 32 * 2**10
"""On a CPU, keys and values of this size or more get a memory mapping of their own. They outlive activations, so on the
heap they would leave holes. Next words at KoGPT2's size, 64 clients for a minute: 1.79 to 1.91 GB became 1.55 to 1.80.
"""


class Sequence:
    """Keys and values of the tokens read so far, in the order in which they were read.

    Each layer keeps its own on its own device, as a model may be spread over several.
    """

    def __init__(self) -> None:
        self.length = 0
        self.positions: list[int] = []
        """Of the tokens read, and of those of the pass that is under way."""
        self.kept: list[torch.Tensor] = []
        """Keys and values per layer that has read anything, shape (2, heads, room, width)."""

    def of_layer(self, layer: int, like: torch.Tensor, tokens: int) -> torch.Tensor:
        """A layer's keys and values, with room for `tokens` more. `like` are keys, shape (heads, tokens, width)."""
        if layer > len(self.kept):
            raise NotInSteps(KEEPS_MORE)
        if layer == len(self.kept):
            self.kept.append(like.new_empty(2, like.shape[0], 0, like.shape[2]))
        kept = self.kept[layer]
        if self.length + tokens > kept.shape[2]:
            larger = _empty(kept, 2, kept.shape[1], self.length + tokens + ROOM, kept.shape[3])
            larger[:, :, : self.length] = kept[:, :, : self.length]
            self.kept[layer] = kept = larger
        return kept

    def copy_of_first(self, tokens: int) -> Sequence:
        """A new sequence that has read this one's first tokens."""
        copy = Sequence()
        copy.length = tokens
        copy.positions = self.positions[:tokens]
        firsts = [kept[:, :, :tokens] for kept in self.kept]
        copy.kept = [_empty(first, *first.shape).copy_(first) for first in firsts]
        return copy

    @property
    def allocated(self) -> int:
        """Bytes of all keys and values, with the room for more."""
        return sum(kept.nbytes for kept in self.kept)

    def nbytes(self, tokens: int) -> int:
        """Bytes of the first tokens' keys and values."""
        return sum(kept[:, :, :tokens].nbytes for kept in self.kept)


@dataclass(frozen=True)
class Turn:
    """The tokens that one sequence reads in a pass."""

    sequence: Sequence
    ids: list[int]
    positions: list[int]
    visible: np.ndarray | None = None
    """Which tokens of the sequence each new token attends to: bool, shape (ids, length + ids). None: all before it and
    itself. A sliding window hides more of them."""
    embeddings: torch.Tensor | None = None
    """Embeddings to read instead of the ids' own, shape (ids, width)."""

    def visible_in(self, window: int | None) -> np.ndarray | None:
        """As `visible`, for a layer whose tokens attend to the `window` last positions only, their own included.

        None: all tokens before it and itself, where the new tokens are the sequence's first or there is one of them.
        """
        length, tokens = self.sequence.length, len(self.ids)
        if window is None and self.visible is None and (tokens == 1 or length == 0):
            return None
        visible = np.tri(tokens, length + tokens, length, bool) if self.visible is None else self.visible
        if window is None:
            return visible
        near: np.ndarray = np.array(self.sequence.positions) > np.array(self.positions)[:, None] - window
        near &= visible
        return near


class Span:
    """A turn's tokens among those of a pass."""

    def __init__(self, turn: Turn, begin: int, dtype: torch.dtype, device: torch.device) -> None:
        self.begin = begin
        self.end = begin + len(turn.ids)
        self.turn = turn
        self.dtype = dtype
        self.device = device
        self.reach = max(turn.positions) - min(turn.sequence.positions)
        """Distance in positions over which tokens attend, where no window ends it."""
        self._biases: dict[int | None, torch.Tensor | None] = {}

    def bias(self, window: int | None) -> torch.Tensor | None:
        """What a layer with this window adds to its scores, shape (tokens, tokens of the sequence); None: nothing."""
        if window is not None and self.reach < window:
            window = None
        if window not in self._biases:
            visible = self.turn.visible_in(window)
            bias = None if visible is None else bias_of(torch.from_numpy(visible), self.dtype).to(self.device)
            self._biases[window] = bias
        return self._biases[window]


class Reader:
    """Reads turns with a causal language model of transformers, or with the one inside a model such as LLaVA.

    Raises CheckpointError if it does not read as the model's own forward does. The message names the architecture and
    what differs.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel) -> None:
        self.device = device()  # not the model's, which may be the disk if the model is spread
        with refused_if_it_fails(model):
            self.decoder = decoder_of(model)
            require_steps(self.decoder)
            self.head = head_of(model, self.decoder)
            self.first_position = first_position(self.decoder)
            self.max_tokens = max_tokens(self.decoder)
            """Most tokens that a sequence may have."""
            trial = Trial.of(model, self.decoder, self.max_tokens, self.device)
            self.decoder.set_attn_implementation(ATTENTION)
            self._require_same(trial)

    def read(self, turns: Sequence_[Turn]) -> torch.Tensor:
        """The last hidden state of each token of the turns, in order: shape (tokens, width).

        Keys and values are stored in the sequences, but count only once the caller increases their `length`.
        """
        spans, begin = [], 0
        for turn in turns:
            turn.sequence.positions[turn.sequence.length :] = turn.positions
            spans.append(Span(turn, begin, self._bias_dtype, self.device))
            begin = spans[-1].end
        positions = [self.first_position + at for turn in turns for at in turn.positions]
        hidden: torch.Tensor = self.decoder(
            inputs_embeds=torch.cat([self._embeddings(turn) for turn in turns])[None],
            position_ids=torch.tensor([positions], device=self.device),
            use_cache=False,
            spans=spans,
        ).last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits of hidden states that were read: float32, shape (rows, vocabulary)."""
        logits: torch.Tensor = self.head(inputs_embeds=hidden[None]).logits[0]
        return logits.float()

    @property
    def _bias_dtype(self) -> torch.dtype:
        return _dtype(self.decoder.get_input_embeddings().weight)  # never quantised

    def _embeddings(self, turn: Turn) -> torch.Tensor:
        if turn.embeddings is not None:
            return turn.embeddings
        embeddings: torch.Tensor = self.decoder.get_input_embeddings()(torch.tensor(turn.ids, device=self.device))
        return embeddings

    def _require_same(self, trial: Trial) -> None:
        """Read the trial's texts piece by piece, all in the same passes. Raises NotInSteps if they differ."""
        sequences = [Sequence() for _ in trial.texts]
        for piece in PIECES:
            turns = [Turn(sequence, *trial.turn(text, piece)) for text, sequence in enumerate(sequences)]
            hidden = torch.split(self.read(turns), [len(turn.ids) for turn in turns])
            last = [rows[-COMPARED:] for rows in hidden]
            logits = torch.split(self.logits(torch.cat(last)), list(map(len, last)))
            for text, turn in enumerate(turns):
                turn.sequence.length += len(turn.ids)
                trial.require_same(text, piece, logits[text])


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    spans: list[Span] | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Implements transformers' attention interface. Query, key and value have shape (1, heads, tokens, width)."""
    if spans is None:
        raise NotInSteps("its layers don't pass on what attention needs to know")
    if key.shape != value.shape:
        raise NotInSteps("its keys and values have different widths")
    window = more.get("sliding_window", getattr(module, "sliding_window", None))
    result = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
    query, key, value = (each.to(_dtype(each)) for each in (query, key, value))
    for span in spans:
        begin, end, sequence = span.begin, span.end, span.turn.sequence
        length = sequence.length
        kept = sequence.of_layer(module.layer_idx, key[0], end - begin)
        kept[0, :, length : length + end - begin] = key[0, :, begin:end]
        kept[1, :, length : length + end - begin] = value[0, :, begin:end]
        keys, values = kept[:, None, :, : length + end - begin]
        bias = span.bias(window)
        attended = attend(
            query[:, :, begin:end],
            keys,
            values,
            None if bias is None else bias.to(query.device),
            scaling,
            softcap,
            s_aux,
        )
        result[:, begin:end] = attended.transpose(1, 2)
    return result, None


def _empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """An empty tensor of the type and device of `like`. Raises MemoryError, or torch's error, if memory is short."""
    nbytes = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or nbytes < MAPPED_BYTES:
        return like.new_empty(shape)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {nbytes} bytes for keys and values") from error
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def _dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type in which attention runs for such tensors."""
    return torch.float32 if tensor.device.type == "cpu" else tensor.dtype


AttentionInterface.register(ATTENTION, _attend)
