"""Chat: answers conversations token by token, many at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deployments import aside
from deployments.checkpoints import gguf
from deployments.checkpoints.causal_lm import load_causal_lm, load_tokenizer
from deployments.conversation import ChatRequest, Reply, Sampling
from deployments.engines.chat_grammar import Grammars
from deployments.engines.chat_prompt import Prompts
from deployments.engines.chat_template import EXAMPLE
from deployments.engines.contract import Stepping
from deployments.engines.generation import ChatItem, Generation
from deployments.engines.grammar import Closing, allowed_tokens
from deployments.engines.prefix_cache import Prefixes
from deployments.engines.prompt_pace import PromptPace
from deployments.engines.sampling import Choice, choose
from deployments.engines.sequences import Reader, Turn
from deployments.engines.sequences import Sequence as Read
from deployments.load_progress import LoadProgress
from deployments.spec import CheckpointError, Facts, ItemError, ModelSpec


class Chat(Stepping[ChatRequest, ChatItem, Generation]):
    """Sampled decoding, with or without a grammar.

    In one pass, a step reads the last written token of each answer and a part of the prompts of new ones, of a size
    that lets running answers keep their pace. What was read of a conversation stays in the prefix cache for its next
    turn. Keys and values stay within a budget: where it runs out, the youngest answers are put off and resumed.
    """

    checks_files = True
    reads_gguf = True
    streams = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        facts: Facts,
        prefix_bytes: int,
        cache_bytes: int,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.facts = facts
        self.reader = Reader(model)
        self.prefixes = Prefixes(prefix_bytes)
        self.pace = PromptPace()
        self.rows: int = model.get_input_embeddings().num_embeddings
        self.cache_tokens = cache_bytes // self._token_bytes()
        """Tokens of all sequences together whose keys and values fit in the budget."""
        self.max_tokens = min(self.reader.max_tokens, self.cache_tokens)
        """Most tokens of a prompt and its answer."""
        if self.max_tokens < 2:
            raise CheckpointError("kv_cache_mb has no room for keys and values of two tokens; raise it")
        self.ends = _ends(model, tokenizer)
        self.prompts = Prompts(tokenizer, self.max_tokens, min(self.ends))
        template = self.prompts.template
        self.grammars = Grammars(tokenizer, self.ends, template.call_format if template else "none")
        self.closing = Closing(tokenizer)
        self.defaults = _defaults(model)

    @property
    def capabilities(self) -> list[str]:
        """What the model can do, in Ollama's words."""
        return ["completion"] if self.grammars.call_format == "none" else ["completion", "tools"]

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Chat:
        if folder.is_file():
            folder = _unpacked(folder, progress)
        progress.tokenizer()
        tokenizer = load_tokenizer(folder)
        model, facts = load_causal_lm(folder, spec.precision, progress)
        return cls(model, tokenizer, facts, int(spec.prefix_cache_mb * 2**20), int(spec.kv_cache_mb * 2**20))

    def warm_up(self) -> None:
        example, greedy = EXAMPLE if self.prompts.template else None, Sampling(temperature=0)
        try:
            item = self.prepare(ChatRequest(example, "Hello", sampling=greedy, max_tokens=4))
        except ItemError:  # a template may refuse the example, or leave no room for an answer
            item = self.prepare(ChatRequest(prompt=self.prompts.first, sampling=greedy, max_tokens=4))
        self.run([item])

    def prepare(self, request: ChatRequest) -> ChatItem:
        ids = self.prompts.ids(request)
        unknown = next((id for id in ids if not 0 <= id < self.rows), None)
        if unknown is not None:
            raise ItemError(f"token {unknown} has no embedding: there are {self.rows}", "prompt")
        wrong = next((id for id in request.sampling.logit_bias if not 0 <= id < self.rows), None)
        if wrong is not None:
            raise ItemError(f"logit_bias names token {wrong}, but the model has {self.rows}", "logit_bias")
        room = self.max_tokens - len(ids)
        matcher, is_json, call_format = self.grammars.of(request)
        return ChatItem(
            ids,
            request,
            self._sampling(request.sampling),
            min(request.max_tokens or room, room),
            matcher,
            is_json,
            call_format,
        )

    def cost(self, item: ChatItem) -> int:
        return min(len(item.ids), self.pace.room)

    def begin(self, item: ChatItem) -> Generation:
        return Generation(item, self.ends, self._decode, self.grammars.tokens.decode_bytes, lambda: self.pace.room)

    def run(self, items: list[ChatItem]) -> list[Any]:
        """Run the items without the prefix cache, as measurements run the same items again and again."""
        kept, self.prefixes = self.prefixes, Prefixes(max_bytes=0)
        try:
            return super().run(items)
        finally:
            self.prefixes = kept

    @torch.inference_mode()
    def step(self, works: list[Generation]) -> None:
        for work in works:
            work.check_time()
        works = [work for work in works if work.result is None]
        if not works:
            return
        started = time.monotonic()
        reading = self._planned(works)
        turns = [
            Turn(work.sequence, ids, list(range(work.sequence.length, work.sequence.length + len(ids))))
            for work, ids in reading
            if work.sequence
        ]
        try:
            hidden = self.reader.read(turns)
            rows = np.cumsum([len(turn.ids) for turn in turns]) - 1
            writing = [at for at, (work, ids) in enumerate(reading) if len(ids) == len(work.to_read)]
            writers = [reading[at][0] for at in writing]
            choices = self._chosen(writers, hidden[rows[writing]]) if writers else []
        except Exception:  # perhaps out of memory
            self.prefixes.clear()
            raise
        # Works change only from here on, so a step that ran out of memory can be repeated.
        for work, ids in reading:
            work.has_read(len(ids))
        for work, choice in zip(writers, choices, strict=True):
            work.write(choice)
        for work in writers:
            if isinstance(work.result, Reply) and work.sequence:
                read = [*work.item.ids, *work.tokens][: work.sequence.length]
                self.prefixes.give(work.item.request.tenant, read, work.sequence)
                work.sequence = None
        self.pace.observe(sum(len(ids) for _, ids in reading), len(writers), time.monotonic() - started)

    def _planned(self, works: list[Generation]) -> list[tuple[Generation, list[int]]]:
        """What each work reads in this step. Oldest first, as far as the budget of keys and values goes."""
        left = self.cache_tokens
        fit: list[Generation] = []
        for work in works:
            left -= work.length + 1
            if left >= 0 or not fit:
                fit.append(work)
            elif work.sequence:
                work.put_off()
        room = self.pace.room if any(not work.is_prompt for work in fit) else self.pace.most
        reading = []
        for work in fit:
            if work.sequence is None:
                work.sequence = self.prefixes.sequence(work.item.request.tenant, work.to_read)
                del work.to_read[: work.sequence.length]
                if work.cached is None:
                    work.cached = work.sequence.length
            ids = work.to_read[:room] if work.is_prompt else work.to_read
            if work.is_prompt:
                room -= len(ids)
            if ids:
                reading.append((work, list(ids)))
        return reading

    def _chosen(self, works: list[Generation], hidden: torch.Tensor) -> list[Choice]:
        """The next token of each work. `hidden` are the hidden states of their last tokens."""
        logits = self.reader.logits(hidden)
        return choose(logits, [work.draws for work in works], self._allowed(works, logits.shape[1]))

    def _allowed(self, works: list[Generation], vocabulary: int) -> torch.Tensor | None:
        """The tokens that the works' grammars allow, shape (works, vocabulary); None: all."""
        if not any(work.matcher for work in works):
            return None
        allowed = np.ones((len(works), vocabulary), dtype=bool)
        for row, work in enumerate(works):
            if work.matcher:
                allowed[row] = allowed_tokens(work.matcher, vocabulary)
                if work.should_close:
                    allowed[row] = self.closing.among(allowed[row])
        return torch.from_numpy(allowed).to(self.reader.device)

    def _sampling(self, asked: Sampling) -> Sampling:
        """What the request leaves open is as the checkpoint says."""
        fields = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return replace(asked, **{name: getattr(self.defaults, name) for name in fields if getattr(asked, name) is None})

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        sequence = Read()
        with torch.inference_mode():
            self.reader.read([Turn(sequence, [0], [0])])
        return max(1, sequence.nbytes(1))


def _unpacked(path: Path, progress: LoadProgress) -> Path:
    """The folder with the model of a GGUF file. It is unpacked in a process of its own, for the memory that takes."""
    folder = gguf.folder_of(path)
    if not folder.is_dir():
        aside.run("deployments.checkpoints.gguf:unpack", path, progress=progress)
    return folder


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The tokens that end an answer."""
    known = [model.generation_config.eos_token_id if model.generation_config else None, model.config.eos_token_id]
    lists = [each if isinstance(each, list) else [each] for each in (*known, tokenizer.eos_token_id)]
    ends = frozenset(id for each in lists for id in each if id is not None)
    if not ends:
        raise CheckpointError("neither the checkpoint's configs nor its tokenizer name a token that ends an answer")
    return ends


def _defaults(model: PreTrainedModel) -> Sampling:
    """The sampling that the checkpoint's generation_config.json asks for."""
    known = model.generation_config.to_diff_dict() if model.generation_config else {}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    if known.get("do_sample") is False:
        return Sampling(repetition_penalty=known.get("repetition_penalty"))
    return Sampling(**{name: known[name] for name in names if known.get(name) is not None})
