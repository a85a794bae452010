"""Attention from some of a sequence's tokens to its keys and values."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output of attention, shape (1, heads, tokens, width), as is `query`.

    `keys` and `values` have shape (1, key heads, keys, width); several heads may share a key head. `bias`, shape
    (tokens, keys), is added to the scores. If it is None, a single token attends to all keys; several tokens must be as
    many as the keys, and each attends to itself and to those before it. `softcap` bounds the scores, as in Gemma 2.
    `sinks` has one score per head that takes part in the softmax but has no value, as in gpt-oss.
    """
    causal = bias is None and query.shape[2] > 1
    if softcap is None and sinks is None:
        gqa = query.shape[1] != keys.shape[1]
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=gqa
        )
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = query @ keys.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        bias = torch.full_like(scores[0, 0], torch.finfo(scores.dtype).min).triu(1)
    if bias is not None:
        scores = scores + bias
    if sinks is not None:
        column = sinks.to(scores)[None, :, None, None].expand(1, -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype)
    return weights[..., : keys.shape[2]] @ values


def bias_of(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `attend` adds to scores so that only visible keys count. `visible` is bool, shape (tokens, keys)."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
