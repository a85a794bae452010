"""Predicts next words with a causal language model whose tokens follow KoGPT2: `▁` begins a word."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from deployments.checkpoints.files import read_json
from deployments.checkpoints.loading import load_model
from deployments.engines import calibration
from deployments.engines.contract import Stepping
from deployments.engines.limits import max_tokens
from deployments.engines.prefix_cache import Prefixes
from deployments.engines.sequences import Reader, Turn
from deployments.engines.word_search import Candidate, Prefix, WordSearch
from deployments.load_progress import LoadProgress
from deployments.messages import Prompt, Word
from deployments.spec import CheckpointError, Facts, ItemError, ModelSpec, first_line

WORD_START = "▁"
MAX_INPUT_TOKENS = 128
CHARS_PER_TOKEN = 16
"""More characters than a token has in any text. Text further back than this per token read is never tokenised."""
MAX_WORD_TOKENS = 10
MAX_FIRST_TOKENS = 50
COLDEST = 1e-30
"""Lowest temperature. Here the likeliest token has all the probability; less would round to zero in float32."""
HEAD_ROWS = 256
"""Rows whose probabilities over the whole vocabulary are computed at once."""

SPECIALS = {
    "bos_token": "</s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
"""KoGPT2's special tokens, which its files don't name. AutoTokenizer's GPT-2 tokenizer would lose all Korean."""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A token for one byte of a character."""


class Predictor(Stepping[Prompt, Prefix, WordSearch]):
    """Candidates are the likeliest first tokens, each continued greedily until the word ends.

    In one pass, a step reads the prefixes of new searches and one token of each candidate of the others. The candidates
    of a search share the keys and values of its prefix, and each adds those of its own tokens.
    """

    runtimes = ("torch",)
    checks_files = True

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: Facts, prefix_bytes: int
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.facts = facts
        self.tokens: list[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        device = model.device
        vocabulary = model.config.vocab_size
        self.begins_word = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        special = torch.ones(vocabulary, dtype=torch.bool, device=device)
        known = min(vocabulary, len(self.tokens))
        self.begins_word[:known] = torch.tensor([token.startswith(WORD_START) for token in self.tokens[:known]])
        special[:known] = False
        special[[id for id in tokenizer.all_special_ids if id < vocabulary]] = True
        special[[id for id, token in enumerate(self.tokens[:known]) if BYTE.fullmatch(token)]] = True
        self.special: list[bool] = special.tolist()
        self.ends_word: list[bool] = (self.begins_word | special).tolist()
        self.reader = Reader(model)
        self.prefixes = Prefixes(prefix_bytes)
        self.rows: int = model.get_input_embeddings().num_embeddings
        self.max_input_tokens = min(MAX_INPUT_TOKENS, self.reader.max_tokens - (MAX_WORD_TOKENS - 1))

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Predictor:
        progress.tokenizer()
        tokenizer = _tokenizer(folder)
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if masked := [name for name in config.get("architectures") or [] if name.endswith("MaskedLM")]:
            raise CheckpointError(f"next_word needs a causal language model; the one in {folder} is a {masked[0]}")
        build = functools.partial(AutoModelForCausalLM.from_pretrained, folder)
        model, facts = load_model(build, folder, spec.precision, progress, _probed)
        if (limit := max_tokens(model)) < MAX_WORD_TOKENS:
            raise CheckpointError(
                f"the model in {folder} has {limit} positions, but a word alone may take {MAX_WORD_TOKENS}"
            )
        return cls(model, tokenizer, facts, int(spec.prefix_cache_mb * 2**20))

    def warm_up(self) -> None:
        self.run([self.prepare(Prompt("오늘 날씨가")), self.prepare(Prompt(""))])

    def prepare(self, request: Prompt) -> Prefix:
        words = request.text.rstrip()
        begins_word = len(words) < len(request.text) or not words
        words = words[-CHARS_PER_TOKEN * self.max_input_tokens :]
        ids = self.tokenizer.encode(words, add_special_tokens=False)[-self.max_input_tokens :] if words else []
        unknown = next((id for id in ids if id >= self.rows), None)
        if unknown is not None:
            raise ItemError(
                f"token {self.tokens[unknown]!r} has id {unknown}, for which the checkpoint has no embedding: there "
                f"are {self.rows}"
            )
        return Prefix(ids or [self.tokenizer.bos_token_id], begins_word, request)

    def cost(self, item: Prefix) -> int:
        return len(item.ids)

    def run(self, items: list[Prefix]) -> list[list[Word]]:
        """Run the items without the prefix cache, as measurements run the same items again and again."""
        kept, self.prefixes = self.prefixes, Prefixes(max_bytes=0)
        try:
            return super().run(items)
        finally:
            self.prefixes = kept

    def begin(self, item: Prefix) -> WordSearch:
        return WordSearch(item)

    @torch.inference_mode()
    def step(self, works: list[WordSearch]) -> None:
        begun = [search for search in works if not search.candidates]
        grown = [search for search in works if search.candidates]
        turns = [search.turn(self.prefixes) for search in (*begun, *grown)]
        try:
            hidden = self.reader.read(turns)
        except Exception:  # perhaps out of memory
            self.prefixes.clear()
            raise
        ends = np.cumsum([0, *(len(turn.ids) for turn in turns[: len(begun)])])
        candidates = self._candidates([search.item for search in begun], hidden[ends[1:] - 1]) if begun else []
        next_tokens = self._likeliest(hidden[ends[-1] :])
        # Searches change only from here on, so a step that ran out of memory can be repeated.
        for turn in turns:
            turn.sequence.length += len(turn.ids)
        for search, turn, found in zip(begun, turns, candidates, strict=False):
            self.prefixes.keep(search.item.prompt.tenant, search.item.ids, turn.sequence)
            search.candidates = found
            search.growing = found if search.item.prompt.complete_word else []
        for search, turn in zip(grown, turns[len(begun) :], strict=True):
            self._grow(search, turn, next_tokens)
        for search in works:
            if not search.growing:
                search.result = self._best(search)

    def _candidates(self, items: list[Prefix], hidden: torch.Tensor) -> list[list[Candidate]]:
        """The candidates' first tokens, per item. `hidden` are the hidden states of the items' last tokens."""
        logits = torch.cat([self.reader.logits(rows) for rows in torch.split(hidden, HEAD_ROWS)])
        temperatures = torch.tensor([max(item.prompt.temperature, COLDEST) for item in items], device=logits.device)
        scaled = (logits - logits.max(-1, keepdim=True).values) / temperatures[:, None]
        begins = torch.tensor([item.begins_word for item in items], device=logits.device)
        allowed = logits.masked_fill(begins[:, None] & ~self.begins_word, -torch.inf)
        counts = [min(3 * item.prompt.top_k, MAX_FIRST_TOKENS, logits.shape[-1]) for item in items]
        first = torch.topk(allowed, max(counts))
        probabilities = torch.exp(scaled.gather(-1, first.indices) - scaled.logsumexp(-1, keepdim=True))
        lists = zip(counts, first.indices.tolist(), first.values.tolist(), probabilities.tolist(), strict=True)
        return [
            [
                Candidate([token], probability)
                for token, logit, probability in zip(tokens[:count], values[:count], found[:count], strict=True)
                if logit > -torch.inf and not self.special[token]
            ]
            for count, tokens, values, found in lists
        ]

    def _grow(self, search: WordSearch, turn: Turn, next_tokens: Iterator[tuple[int, float]]) -> None:
        """Give each growing candidate its next token, or finish it."""
        growing = []
        for place, candidate in enumerate(search.growing, turn.sequence.length - len(turn.ids)):
            candidate.places.append(place)
            token, probability = next(next_tokens)
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

    def _likeliest(self, hidden: torch.Tensor) -> Iterator[tuple[int, float]]:
        """The likeliest token after each row, with its probability."""
        tokens: list[int] = []
        probabilities: list[float] = []
        for rows in torch.split(hidden, HEAD_ROWS):
            logits = self.reader.logits(rows)
            best, token = logits.max(dim=-1)
            tokens += token.tolist()
            probabilities += torch.exp(best - torch.logsumexp(logits, dim=-1)).tolist()
        return iter(zip(tokens, probabilities, strict=True))

    def _appended(self, candidate: Candidate) -> str:
        return "".join(self.tokens[id] for id in candidate.ids).replace(WORD_START, " ")

    def _best(self, search: WordSearch) -> list[Word]:
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
        """Share of prompts whose best word is the same."""
        first, second = ([words[0].text if words else "" for batch in batches for words in batch]
                         for batches in (original, answers))  # fmt: skip
        return {"same_word": sum(map(str.__eq__, first, second)) / len(first)}


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer. Raises CheckpointError if it does not mark words as KoGPT2's does."""
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"there is no tokenizer.json in {folder}; save the tokenizer as a fast tokenizer")
    try:
        bare = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the Rust part raises plain Exceptions, and settings of wrong types raise any kind
        raise CheckpointError(f"the tokenizer in {folder} can't be read: {first_line(error)}") from error
    known = bare.get_vocab()
    made = read_json(folder / "config.json").get("architectures") if (folder / "config.json").is_file() else None
    found = (
        f"next_word needs a language model with KoGPT2's tokenizer; the one in {folder} ({made or 'of unknown kind'})"
    )
    if not any(token.startswith(WORD_START) for token in known):
        raise CheckpointError(f"{found} has no tokens that begin with {WORD_START!r}, which marks the start of a word")
    if SPECIALS["eos_token"] not in known:
        raise CheckpointError(f"{found} has no token {SPECIALS['eos_token']!r}, which begins and ends texts")
    specials = {role: token for role, token in SPECIALS.items() if token in known}
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder, **specials)
    return tokenizer


@torch.inference_mode()
def _probed(model: PreTrainedModel) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.arange(4)[None]).logits
    return logits
