"""What an encoder takes: rows of token ids, within the limits of its checkpoint."""

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
    """Token ids of one item, and their segments where the model tells two texts apart: int64, shape (tokens,)."""

    ids: np.ndarray
    segments: np.ndarray | None = None
    unpooled: int = 0
    """Leading tokens, those of a prompt, that pooling leaves out."""

    def after_prompt(self, tokens: int) -> Encoded:
        """The same, with so many tokens of a prompt at its beginning that pooling leaves out."""
        return replace(self, unpooled=tokens) if tokens else self


@dataclass(frozen=True)
class Prompts:
    """What a model wants before its texts, by name."""

    texts: dict[str, str] = field(default_factory=dict)
    default: str = ""
    """Before a text of which nothing is said."""
    of_input_type: dict[str, str] = field(default_factory=dict)
    """Before queries and before documents."""

    def text(self, name: str | None, input_type: str | None) -> str:
        """Raises ItemError for a name that the model has no prompt of."""
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
    """The limits of a checkpoint, and how token ids become a batch."""

    max_tokens: int
    """Of one item, special tokens included."""
    rows: int
    """Of the embedding table: every id is below it."""
    pad_id: int = 0
    pads_left: bool = False
    """As a causal model reads its last token."""
    segments: bool = False
    """The model is told which tokens are of the second text."""
    cuts_left: bool = False
    """Of a text that is too long, the end stays."""
    splits_specials: bool = False
    """Special tokens in a text are read as plain text."""
    prompts: Prompts = Prompts()
    unpooled: dict[str, int] = field(default_factory=dict)
    """Leading tokens that pooling leaves out, by prompt; empty where it takes all."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> InputSpec:
        """Raises OSError, ValueError or TypeError for a file that is not there or was not written by `write`."""
        known = json.loads(path.read_text(encoding="utf-8"))
        return cls(**known | {"prompts": Prompts(**known["prompts"])})

    def batch(self, items: Sequence[Encoded], multiple: int = 1) -> Arrays:
        """Model inputs as int64 arrays of shape (items, longest), the longest rounded up to a multiple if it may be."""
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
        """Raises ItemError for a token whose id the embedding table has no row for."""
        if item.ids.size and (highest := int(item.ids.max())) >= self.rows:
            raise ItemError(
                f"it has the token {token_of(highest)!r} of id {highest}, for which the checkpoint has no embedding: "
                f"there are {self.rows}"
            )
        return item


def _segments(item: Encoded) -> np.ndarray:
    return np.zeros_like(item.ids) if item.segments is None else item.segments
