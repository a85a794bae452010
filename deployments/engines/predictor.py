"""Next words from a causal language model with KoGPT2's conventions: a token that begins with `▁` begins a word."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

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


class Predictor:
    """Candidates are the likeliest first tokens, each continued greedily until the word ends.

    A prefix is read once; all its candidates continue as one batch from its key-value cache.
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

    def run(self, items: list[Prefix]) -> list[list[Word]]:
        return [self._predict(item) for item in items]

    @torch.inference_mode()
    def _predict(self, item: Prefix) -> list[Word]:
        prompt = item.prompt
        read = self.model(torch.tensor([item.ids], device=self.model.device), use_cache=True)
        logits = read.logits[0, -1].float()
        probabilities = torch.softmax((logits - logits.max()) / prompt.temperature, dim=-1)
        if item.begins_word:
            logits = logits.masked_fill(~self.begins_word, -torch.inf)
        first = torch.topk(logits, min(3 * prompt.top_k, MAX_FIRST_TOKENS, len(logits)))
        words = [
            [token]
            for token, logit in zip(first.indices.tolist(), first.values.tolist(), strict=True)
            if logit > -torch.inf and not self.special[token]
        ]
        if not words:
            return []
        confidences = [float(probabilities[token]) for [token] in words]
        if prompt.complete_word:
            self._complete(words, confidences, read.past_key_values)
        return self._best(words, confidences, item)

    def _complete(self, words: list[list[int]], confidences: list[float], cache: object) -> None:
        """Append to each word its likeliest next tokens until it ends, and multiply their probabilities."""
        cache.batch_repeat_interleave(len(words))  # type: ignore[attr-defined]
        growing = list(range(len(words)))
        latest = torch.tensor([word[-1:] for word in words], device=self.model.device)
        for _ in range(MAX_WORD_TOKENS - 1):
            step = self.model(latest, past_key_values=cache, use_cache=True)
            probability, token = torch.softmax(step.logits[:, -1].float(), dim=-1).max(dim=-1)
            ends = (self.begins_word[token] | self.special[token]).tolist()
            growing = [row for row in growing if not ends[row]]
            if not growing:
                return
            for row in growing:
                words[row].append(int(token[row]))
                confidences[row] *= float(probability[row])
            latest = token[:, None]

    def _best(self, words: list[list[int]], confidences: list[float], item: Prefix) -> list[Word]:
        best: dict[str, Word] = {}
        for ids, confidence in zip(words, confidences, strict=True):
            append = "".join(self.tokens[id] for id in ids).replace(WORD_START, " ")
            if item.begins_word:
                append = append.lstrip()
            text = "".join(append.split())
            if text and (text not in best or best[text].confidence < confidence):
                best[text] = Word(text, append, confidence)
        return sorted(best.values(), key=lambda word: -word.confidence)[: item.prompt.top_k]

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
