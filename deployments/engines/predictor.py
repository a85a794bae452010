"""Next words from a causal language model with KoGPT2's conventions: a token that begins with `▁` begins a word."""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from deployments import calibration
from deployments.items import Prompt, Word
from deployments.loading import load_model
from deployments.progress import LoadProgress
from deployments.spec import Facts, ModelSpec

WORD_START = "▁"
MAX_INPUT_TOKENS = 128
MAX_INPUT_CHARS = 16 * MAX_INPUT_TOKENS
"""More than 128 tokens' worth of any text: what lies before it is never tokenised."""
MAX_WORD_TOKENS = 10
MAX_FIRST_TOKENS = 50
HEAD_ROWS = 256
"""Rows whose probabilities over the whole vocabulary are worked out at once."""

SPECIALS = {
    "bos_token": "</s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
"""KoGPT2's, which its files don't name: AutoTokenizer makes a GPT-2 tokenizer of them that loses all Korean."""


@dataclass(frozen=True)
class Prefix:
    """An item: the ids of the input's last tokens, and what is asked of them."""

    ids: list[int]
    begins_word: bool
    """The input ended in a space, so only tokens that begin a word are candidates."""
    prompt: Prompt


@dataclass(eq=False)
class Candidate:
    """A word that grows token by token."""

    ids: list[int]
    confidence: float
    places: list[int] = field(default_factory=list)
    """Of its tokens in its item's row of the key-value cache."""


class Search:
    """The candidates of one item: those that still grow, and the words of those that have ended."""

    def __init__(self, item: Prefix, candidates: list[Candidate]) -> None:
        self.item = item
        self.candidates = candidates
        self.growing = candidates if item.prompt.complete_word else []
        self.ended: dict[str, float] = {}
        """Confidence by text; the larger one where two candidates became the same word."""

    def end(self, text: str, confidence: float) -> None:
        if text:
            self.ended[text] = max(self.ended.get(text, 0.0), confidence)

    def give_up_hopeless(self) -> None:
        """A confidence never grows: below the `top_k` best words that have ended it can't be among them any more."""
        if len(self.ended) >= self.item.prompt.top_k:
            bar = heapq.nlargest(self.item.prompt.top_k, self.ended.values())[-1]
            self.growing = [candidate for candidate in self.growing if candidate.confidence >= bar]


class Predictor:
    """Candidates are the likeliest first tokens, each continued greedily until the word ends.

    The prefixes of a batch are read together, then all candidates of all items take their next token in one step.
    Those of one item stand side by side in its row of the key-value cache, where each sees the prefix and its own
    tokens: so the prefix is kept once, not once per candidate.
    """

    runtimes = ("torch",)

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: Facts) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.facts = facts
        self.tokens: list[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        device = model.device
        vocabulary = model.config.vocab_size
        self.begins_word = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.special = torch.ones(vocabulary, dtype=torch.bool, device=device)
        known = min(vocabulary, len(self.tokens))
        self.begins_word[:known] = torch.tensor([token.startswith(WORD_START) for token in self.tokens[:known]])
        self.special[:known] = False
        self.special[[id for id in tokenizer.all_special_ids if id < vocabulary]] = True
        self.ends_word: list[bool] = (self.begins_word | self.special).tolist()

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Predictor:
        progress.tokenizer()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **SPECIALS)
        build = functools.partial(AutoModelForCausalLM.from_pretrained, folder)
        model, facts = load_model(build, folder, spec.precision, progress)
        return cls(model, tokenizer, facts)

    def warm_up(self) -> None:
        self.run([self.prepare(Prompt("오늘 날씨가")), self.prepare(Prompt(""))])

    def prepare(self, request: Prompt) -> Prefix:
        text = request.text
        if len(text) > MAX_INPUT_CHARS:
            text = text[-MAX_INPUT_CHARS:].partition(" ")[2] or text[-MAX_INPUT_CHARS:]
        words = text.rstrip()
        ids = self.tokenizer.encode(words, add_special_tokens=False)[-MAX_INPUT_TOKENS:] if words else []
        return Prefix(ids or [self.tokenizer.bos_token_id], len(words) < len(text) or not words, request)

    def cost(self, item: Prefix) -> int:
        return len(item.ids)

    @torch.inference_mode()
    def run(self, items: list[Prefix]) -> list[list[Word]]:
        lengths = torch.tensor([len(item.ids) for item in items], device=self.model.device)
        ids = torch.zeros(len(items), int(lengths.max()), dtype=torch.long)
        for row, item in enumerate(items):
            ids[row, : len(item.ids)] = torch.tensor(item.ids)
        # Padding comes last, where nothing before it sees it.
        read = self.model.base_model(ids.to(self.model.device), use_cache=True)
        last = read.last_hidden_state[torch.arange(len(items), device=lengths.device), lengths - 1]
        logits = torch.cat([self._logits(rows) for rows in torch.split(last, HEAD_ROWS)])
        searches = [Search(item, self._candidates(item, row)) for item, row in zip(items, logits, strict=True)]
        self._grow(searches, lengths, read.past_key_values)
        return [self._best(search) for search in searches]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32, shape (rows, vocabulary)."""
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden).float()
        return logits

    def _candidates(self, item: Prefix, logits: torch.Tensor) -> list[Candidate]:
        # In double precision, as a temperature of 1e-300 is none in single.
        probabilities = torch.softmax((logits - logits.max()).double() / item.prompt.temperature, dim=-1)
        if item.begins_word:
            logits = logits.masked_fill(~self.begins_word, -torch.inf)
        first = torch.topk(logits, min(3 * item.prompt.top_k, MAX_FIRST_TOKENS, len(logits)))
        confidences = probabilities[first.indices].tolist()
        return [
            Candidate([token], confidence)
            for token, logit, confidence in zip(first.indices.tolist(), first.values.tolist(), confidences, strict=True)
            if logit > -torch.inf and not self.special[token]
        ]

    def _grow(self, searches: list[Search], lengths: torch.Tensor, cache: Any) -> None:
        """Append to each candidate its likeliest next tokens until it ends, and multiply their probabilities."""
        width = int(lengths.max())
        prefix = torch.arange(width, device=lengths.device) < lengths[:, None]
        for step in range(MAX_WORD_TOKENS - 1):
            rows = [row for row, search in enumerate(searches) if search.growing]
            if not rows:
                return
            if len(rows) < len(searches):
                searches = [searches[row] for row in rows]
                cache.batch_select_indices(torch.tensor(rows, device=lengths.device))
                lengths, prefix = lengths[rows], prefix[rows]
            self._step(searches, lengths + step, prefix, cache)

    def _step(self, searches: list[Search], positions: torch.Tensor, prefix: torch.Tensor, cache: Any) -> None:
        """Give each growing candidate its next token, or end it."""
        begin = cache.get_seq_length()
        most = max(len(search.growing) for search in searches)
        ids = np.zeros((len(searches), most), np.int64)
        visible = np.zeros((len(searches), most, begin + most), bool)
        visible[:, :, : prefix.shape[1]] = prefix.cpu().numpy()[:, None]
        for row, search in enumerate(searches):
            for column, candidate in enumerate(search.growing):
                ids[row, column] = candidate.ids[-1]
                candidate.places.append(begin + column)
                visible[row, column, candidate.places] = True
        hidden = self.model.base_model(
            torch.from_numpy(ids).to(prefix.device),
            attention_mask=self._bias(visible),
            position_ids=positions[:, None].expand(-1, most),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        grew = [(row, column) for row, search in enumerate(searches) for column in range(len(search.growing))]
        tokens, probabilities = self._likeliest(hidden[tuple(zip(*grew, strict=True))])
        taken = iter(zip(tokens, probabilities, strict=True))
        for search in searches:
            growing = []
            for candidate in search.growing:
                token, probability = next(taken)
                ends = self.ends_word[token]
                if not ends:
                    candidate.ids.append(token)
                    candidate.confidence *= probability
                if ends or len(candidate.ids) == MAX_WORD_TOKENS:
                    search.end("".join(self._appended(candidate).split()), candidate.confidence)
                else:
                    growing.append(candidate)
            search.growing = growing
            search.give_up_hopeless()

    def _bias(self, visible: np.ndarray) -> torch.Tensor:
        """What attention adds to its scores, shape (items, 1, tokens, tokens in the cache)."""
        dtype = self.model.dtype
        bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~torch.from_numpy(visible), torch.finfo(dtype).min)
        return bias[:, None].to(self.model.device)

    def _likeliest(self, hidden: torch.Tensor) -> tuple[list[int], list[float]]:
        """The likeliest token after each row, and its probability."""
        tokens: list[int] = []
        probabilities: list[float] = []
        for rows in torch.split(hidden, HEAD_ROWS):
            logits = self._logits(rows)
            best, token = logits.max(dim=-1)
            tokens += token.tolist()
            probabilities += torch.exp(best - torch.logsumexp(logits, dim=-1)).tolist()
        return tokens, probabilities

    def _appended(self, candidate: Candidate) -> str:
        return "".join(self.tokens[id] for id in candidate.ids).replace(WORD_START, " ")

    def _best(self, search: Search) -> list[Word]:
        best: dict[str, Word] = {}
        for candidate in search.candidates:
            append = self._appended(candidate)
            if search.item.begins_word:
                append = append.lstrip()
            text = "".join(append.split())
            if text and (text not in best or best[text].confidence < candidate.confidence):
                best[text] = Word(text, append, candidate.confidence)
        return sorted(best.values(), key=lambda word: -word.confidence)[: search.item.prompt.top_k]

    @staticmethod
    def calibration() -> list[list[Prompt]]:
        prompts = [Prompt(text, top_k=1) for text in calibration.read()["prompts"]]
        return [prompts[start : start + 8] for start in range(0, len(prompts), 8)]

    @staticmethod
    def agreement(original: list[list[list[Word]]], answers: list[list[list[Word]]]) -> dict[str, float]:
        """The share of prompts whose best word is the same."""
        first, second = ([words[0].text if words else "" for batch in batches for words in batch]
                         for batches in (original, answers))  # fmt: skip
        return {"same_word": sum(map(str.__eq__, first, second)) / len(first)}
