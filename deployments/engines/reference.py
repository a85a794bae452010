"""Encoders that only sentence-transformers can run: inputs built by chat templates, and models without token ids."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
import torch
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import CNN

from deployments.engines.grouping import in_groups
from deployments.engines.inputs import Encoded, InputSpec, Prompts
from deployments.engines.limits import UNBOUNDED, table_rows
from deployments.engines.tokens import TextTokenizer, too_long
from deployments.messages import InputType
from deployments.spec import Facts, ItemError, first_line


class ReferenceTokenizer:
    """Token ids as sentence-transformers makes them, one thread at a time.

    A text with more tokens than can matter is shortened first. Only the template's own text can follow it.
    """

    def __init__(self, model: Any, spec: InputSpec, rust: tokenizers.Tokenizer | None) -> None:
        self.model = model
        self.spec = spec
        self._cutter = TextTokenizer(rust, spec) if rust else None
        self._lock = threading.Lock()

    def encode(self, text: str, pair: str | None = None, truncate: bool = True) -> Encoded:
        """Raises ItemError if `truncate` is off and the text is too long, and for a token the model does not know."""
        cut = self._cutter.shortened if self._cutter else str
        given = cut(text) if pair is None else (cut(text), cut(pair))
        with self._lock:
            if not truncate:
                whole = self.model.preprocess([given], processing_kwargs={"text": {"truncation": False}})
                if whole["input_ids"].shape[-1] > self.spec.max_tokens:
                    raise too_long(self.spec.max_tokens)
            limit = {"text": {"truncation": True, "max_length": self.spec.max_tokens}}
            features = self.model.preprocess([given], processing_kwargs=limit)
        segments = features.get("token_type_ids")
        encoded = Encoded(features["input_ids"][0].numpy(), None if segments is None else segments[0].numpy())
        return self.spec.checked(encoded, self.model.tokenizer.convert_ids_to_tokens)


@dataclass(frozen=True, eq=False)
class ReferenceItem:
    """An item that stays a text, as sentence-transformers tokenises it later."""

    text: str
    way: tuple[str, InputType | None]
    """The prompt before the text, and its input type, by which a Router chooses modules."""
    tokens: int


class ReferenceEncoder:
    """Vectors from sentence-transformers' own `encode`: for static embeddings, routers and other modules."""

    parallel = 1

    def __init__(self, model: Any, facts: Facts, prompts: Prompts) -> None:
        self.model = model
        self.facts = facts
        self.prompts = prompts
        self._lock = threading.Lock()
        rust = getattr(model[0], "tokenizer", None)
        self._rust = rust if isinstance(rust, tokenizers.Tokenizer) else None
        cut = (self._rust.truncation or {}).get("max_length") if self._rust else None
        self._spec = InputSpec(
            max_tokens=int(min(model.max_seq_length or UNBOUNDED, cut or UNBOUNDED, UNBOUNDED)), rows=_rows(model[0])
        )
        self._alone = any(isinstance(module, CNN) for module in model.modules())
        """Texts must not share a batch, as the model reads the padding too."""
        self.max_tokens = self._spec.max_tokens

    def prepare(
        self,
        text: str,
        pair: str | None = None,
        truncate: bool = True,
        prompt: str = "",
        input_type: InputType | None = None,
    ) -> ReferenceItem:
        try:
            with self._lock:
                ids = self.model.preprocess([text], prompt=prompt or None, task=input_type).get("input_ids")
        except ValueError as error:
            raise ItemError(f"the model can't take it: {first_line(error)}") from error
        encoded = Encoded(np.zeros(0, np.int64) if ids is None else ids.flatten().numpy())
        self._spec.checked(encoded, lambda id: str(id))
        if not truncate and self._count(text, prompt, len(encoded.ids)) > self._spec.max_tokens:
            raise too_long(self._spec.max_tokens)
        return ReferenceItem(text, (prompt, input_type), len(encoded.ids))

    def _count(self, text: str, prompt: str, cut: int) -> int:
        """Tokens of the whole text; `cut`, its tokens after truncation, if they can't be counted."""
        if isinstance(self.model[0], Transformer):
            whole = {"text": {"truncation": False}}
            with self._lock:
                ids = self.model.preprocess([text], prompt=prompt or None, processing_kwargs=whole)["input_ids"]
            return int(ids.numel())
        if self._rust is None:
            return cut
        rust = tokenizers.Tokenizer.from_str(self._rust.to_str())
        rust.no_truncation()
        return len(rust.encode(prompt + text, add_special_tokens=False).ids)

    def prepare_ids(self, ids: list[int], truncate: bool = True) -> ReferenceItem:
        raise ItemError("this model takes texts, not token ids")

    def tokens(self, item: ReferenceItem) -> int:
        return item.tokens

    def rows(self, items: list[ReferenceItem]) -> np.ndarray:
        if self.facts.batches == "mixed":
            return self.run_together(items)
        return in_groups(items, "single", self.tokens, self.run_together)

    @torch.inference_mode()
    def run_together(self, items: list[ReferenceItem]) -> np.ndarray:
        found: np.ndarray | None = None
        for way in {item.way for item in items}:
            places = [place for place, item in enumerate(items) if item.way == way]
            texts = [items[place].text for place in places]
            vectors = self.model.encode(
                texts,
                prompt=way[0],
                task=way[1],
                batch_size=1 if self._alone else len(texts),
                show_progress_bar=False,
            )
            if found is None:
                found = np.zeros((len(items), vectors.shape[1]), np.float32)
            found[places] = vectors
        assert found is not None
        if not np.isfinite(found).all():
            raise RuntimeError("the model's answer is not a number")
        return found


def _rows(module: Any) -> int:
    """Rows of the table in which the first module looks tokens up."""
    if isinstance(module, Transformer):
        return table_rows(module.model)
    table = getattr(module, "embedding", None) or getattr(module, "emb_layer", None)
    return int(getattr(table, "num_embeddings", UNBOUNDED))
