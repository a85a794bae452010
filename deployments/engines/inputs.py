"""Inputs of encoders: rows of token ids, within the limits of the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from deployments.spec import ItemError

Arrays = dict[str, np.ndarray]

QUERY, DOCUMENT = "query", "document"


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids of one item, and their segments if the model distinguishes two texts: int64, shape (tokens,)."""

    ids: np.ndarray
    segments: np.ndarray | None = None
    unpooled: int = 0
    """Leading tokens, from a prompt, that pooling leaves out."""

    def after_prompt(self, tokens: int) -> Encoded:
        """A copy whose first `tokens`, from a prompt, are left out by pooling."""
        return replace(self, unpooled=tokens) if tokens else self


@dataclass(frozen=True)
class Prompts:
    """The prompts that a model expects before its texts, by name."""

    texts: dict[str, str] = field(default_factory=dict)
    default: str = ""
    """Prompt for texts without a prompt name or input type."""
    of_input_type: dict[str, str] = field(default_factory=dict)
    """Prompts for queries and for documents."""

    def text(self, name: str | None, input_type: str | None) -> str:
        """Look up the prompt to use. Raises ItemError if the model has no prompt of that name."""
        if name is not None:
            if name not in self.texts:
                known = ", ".join(self.texts) or "none"
                raise ItemError(f"the model has no prompt {name!r}; it has {known}", "prompt_name")
            return self.texts[name]
        return self.default if input_type is None else self.of_input_type.get(input_type, "")

    @property
    def all(self) -> set[str]:
        return {*self.texts.values(), self.default, *self.of_input_type.values()} - {""}


@dataclass(frozen=True)
class InputSpec:
    """The limits of a checkpoint, and how to pad token ids into a batch."""

    max_tokens: int
    """Most tokens of one item, special tokens included."""
    rows: int
    """Rows of the embedding table; every id must be below this."""
    pad_id: int = 0
    pads_left: bool = False
    """True for causal models, whose last token is read."""
    segments: bool = False
    """The model takes segments, which mark the tokens of the second text."""
    cuts_left: bool = False
    """Texts that are too long lose their beginning, not their end."""
    splits_specials: bool = False
    """Special tokens within a text are read as plain text."""
    prompts: Prompts = Prompts()
    unpooled: dict[str, int] = field(default_factory=dict)
    """Leading tokens that pooling leaves out, by prompt; empty if it leaves out none."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> InputSpec:
        """Raises OSError, ValueError or TypeError if the file is missing or was not written by `write`."""
        known = json.loads(path.read_text(encoding="utf-8"))
        return cls(**known | {"prompts": Prompts(**known["prompts"])})

    def batch(self, items: Sequence[Encoded], multiple: int = 1) -> Arrays:
        """Pad to int64 arrays of shape (items, longest), the longest rounded up to `multiple` if possible."""
        lengths = np.fromiter((len(item.ids) for item in items), np.int64, len(items))
        width = int(-(-lengths.max() // multiple) * multiple)
        if width > self.max_tokens:
            width = int(lengths.max())
        places = np.arange(width)
        begins = width - lengths if self.pads_left else np.zeros_like(lengths)
        mask = (places >= begins[:, None]) & (places < (begins + lengths)[:, None])
        rows = {"input_ids": np.full(mask.shape, self.pad_id, np.int64), "attention_mask": mask.astype(np.int64)}
        rows["input_ids"][mask] = np.concatenate([item.ids for item in items])
        if self.segments:
            rows["token_type_ids"] = np.zeros(mask.shape, np.int64)
            rows["token_type_ids"][mask] = np.concatenate([_segments(item) for item in items])
        if self.unpooled:
            left_out = begins + np.fromiter((item.unpooled for item in items), np.int64, len(items))
            rows["pooling_mask"] = (mask & (places >= left_out[:, None])).astype(np.int64)
        return rows

    def checked(self, item: Encoded, token_of: Callable[[int], str | None]) -> Encoded:
        """Return the item. Raises ItemError for a token whose id has no row in the embedding table."""
        if item.ids.size and (highest := int(item.ids.max())) >= self.rows:
            raise ItemError(
                f"token {token_of(highest)!r} has id {highest}, for which the checkpoint has no embedding: there are "
                f"{self.rows}"
            )
        return item


def _segments(item: Encoded) -> np.ndarray:
    return np.zeros_like(item.ids) if item.segments is None else item.segments
