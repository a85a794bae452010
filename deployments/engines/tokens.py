"""Token ids of one text or pair of texts, and their padding to a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from deployments.spec import ItemError


@dataclass(frozen=True)
class Encoded:
    """Token ids of one item, and their segments where the model tells two texts apart."""

    ids: list[int]
    segments: list[int] | None = None


def encode_one(
    tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int, truncate: bool = True, pair: str | None = None
) -> Encoded:
    """Ids with the model's special tokens, cut to `max_tokens` from the end of the longer text.

    Raises ItemError where `truncate` is off and the text is longer.
    """
    strategy = "longest_first" if truncate else False
    encoded = tokenizer(text, pair, truncation=strategy, max_length=max_tokens if truncate else None, verbose=False)
    ids: list[int] = encoded["input_ids"]
    if len(ids) > max_tokens:
        raise ItemError(f"{len(ids)} tokens are more than the model's {max_tokens}; shorten it or allow truncation")
    return Encoded(ids, encoded.get("token_type_ids"))


def pad(items: list[Encoded], tokenizer: PreTrainedTokenizerBase, device: torch.device) -> dict[str, torch.Tensor]:
    """Model inputs of shape (items, longest), padded on the right."""
    features = {
        "input_ids": _rows([item.ids for item in items], tokenizer.pad_token_id or 0, device),
        "attention_mask": _rows([[1] * len(item.ids) for item in items], 0, device),
    }
    if items[0].segments is not None or "token_type_ids" in tokenizer.model_input_names:
        features["token_type_ids"] = _rows([item.segments or [0] * len(item.ids) for item in items], 0, device)
    return features


def _rows(lists: list[list[int]], fill: int, device: torch.device) -> torch.Tensor:
    longest = max(map(len, lists))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in lists], device=device)
