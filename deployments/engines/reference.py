"""Encoders that only sentence-transformers can run: inputs built by chat templates, and models without token ids."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
import torch
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import CNN
from sentence_transformers.sentence_transformer.modules.tokenizer import WordTokenizer

from deployments.engines.grouping import in_groups
from deployments.engines.inputs import Encoded, InputSpec, Prompts
from deployments.engines.limits import UNBOUNDED, positions, table_rows, text_part
from deployments.engines.tokens import TextTokenizer, too_long
from deployments.messages import InputType
from deployments.spec import Batches, Facts, ItemError, first_line


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


class Input:
    """A module that turns texts into tokens, and its limits."""

    def __init__(self, module: Any, max_tokens: int) -> None:
        self.tokenizer = module.tokenizer
        if isinstance(self.tokenizer, tokenizers.Tokenizer):
            stated = (self.tokenizer.truncation or {}).get("max_length")
            self.tokenizer = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
            self.tokenizer.no_truncation()
        else:
            stated = getattr(module, "max_seq_length", None)
        limit = int(min(UNBOUNDED if stated is None else stated, UNBOUNDED))
        if isinstance(module, Transformer):
            limit = module.max_seq_length = int(min(limit, positions(text_part(module.model)), max_tokens))
        self.spec = InputSpec(max_tokens=limit, rows=_rows(module))

    def count(self, text: str) -> int:
        """Tokens of the whole text."""
        if isinstance(self.tokenizer, tokenizers.Tokenizer):
            return len(self.tokenizer.encode(text, add_special_tokens=False).ids)
        if isinstance(self.tokenizer, WordTokenizer):
            return len(self.tokenizer.tokenize(text))
        return len(self.tokenizer(text, verbose=False)["input_ids"])


class ReferenceEncoder:
    """Vectors from sentence-transformers' own `encode`: for static embeddings, routers and other modules."""

    parallel = 1

    def __init__(self, model: Any, facts: Facts, prompts: Prompts, max_tokens: int) -> None:
        """`max_tokens` bounds one text, besides the model's own limits."""
        self.model = model
        self.facts = facts
        self.prompts = prompts
        self._lock = threading.Lock()
        self._inputs = {module: Input(module, max_tokens) for module in _input_modules(model[0])}
        self._alone = any(isinstance(module, CNN) for module in model.modules())
        """Texts must not share a batch, as the model reads the padding too."""
        self.max_tokens = max(each.spec.max_tokens for each in self._inputs.values())

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
                input = self._inputs[_routed(self.model[0], input_type)]
                whole = 0 if truncate else input.count(prompt + text)
                ids = self.model.preprocess([text], prompt=prompt or None, task=input_type).get("input_ids")
        except ValueError as error:
            raise ItemError(f"the model can't take it: {first_line(error)}") from error
        encoded = Encoded(np.zeros(0, np.int64) if ids is None else ids.flatten().numpy())
        input.spec.checked(encoded, lambda id: str(id))
        if whole > input.spec.max_tokens:
            raise too_long(input.spec.max_tokens)
        return ReferenceItem(text, (prompt, input_type), len(encoded.ids))

    def prepare_ids(self, ids: list[int], truncate: bool = True) -> ReferenceItem:
        raise ItemError("this model takes texts, not token ids")

    def tokens(self, item: ReferenceItem) -> int:
        return item.tokens

    def rows(self, items: list[ReferenceItem]) -> np.ndarray:
        batches: Batches = "mixed" if self.facts.batches == "mixed" else "single"
        return in_groups(items, batches, self.tokens, self.run_together)

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


def _input_modules(module: Any) -> list[Any]:
    """The modules that turn texts into tokens: the first of each route."""
    if not isinstance(module, Router):
        return [module]
    return [each for route in module.sub_modules.values() for each in _input_modules(route[0])]


def _routed(module: Any, input_type: InputType | None) -> Any:
    """The module that turns a text of this type into tokens. Raises ValueError if no route takes it."""
    while isinstance(module, Router):
        module = module.sub_modules[module._resolve_route(task=input_type, modality="text")][0]
    return module


def _rows(module: Any) -> int:
    """Rows of the table in which the module looks tokens up."""
    if isinstance(module, Transformer):
        return table_rows(module.model)
    table = getattr(module, "embedding", None) or getattr(module, "emb_layer", None)
    return int(getattr(table, "num_embeddings", UNBOUNDED))
