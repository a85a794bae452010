"""Chat: answers conversations token by token, many at once."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deployments import aside
from deployments.checkpoints import gguf
from deployments.checkpoints.causal_lm import load_causal_lm, load_tokenizer
from deployments.conversation import ChatRequest, Reply, Sampling
from deployments.engines.chat_template import EXAMPLE, CallFormat, ChatTemplate, try_out
from deployments.engines.contract import Stepping
from deployments.engines.generation import ChatItem, Generation
from deployments.engines.grammar import COMPACT, Closing, allowed_tokens
from deployments.engines.prefix_cache import Prefixes
from deployments.engines.prompt_pace import PromptPace
from deployments.engines.sampling import Choice, choose
from deployments.engines.sequences import Reader, Turn
from deployments.engines.sequences import Sequence as Read
from deployments.engines.tool_calls import OPEN, described, grammar_of_calls, grammar_of_tags
from deployments.load_progress import LoadProgress
from deployments.spec import CheckpointError, Facts, ItemError, ModelSpec

LONGEST_SCHEMA = 256 * 1024
"""Characters of a JSON schema, or of all tools' schemas."""


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
        self.grammar_tokens = llguidance.hf.from_tokenizer(tokenizer, eos_token=sorted(self.ends))
        self.closing = Closing(tokenizer)
        self.template = _template(tokenizer)
        self.defaults = _defaults(model)

    @property
    def capabilities(self) -> list[str]:
        """What the model can do, in Ollama's words."""
        calls = self.template is not None and self.template.call_format != "none"
        return ["completion", "tools"] if calls else ["completion"]

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Chat:
        if folder.is_file():
            folder = _unpacked(folder, progress)
        progress.tokenizer()
        tokenizer = load_tokenizer(folder)
        model, facts = load_causal_lm(folder, spec.precision, progress)
        return cls(model, tokenizer, facts, int(spec.prefix_cache_mb * 2**20), int(spec.kv_cache_mb * 2**20))

    def warm_up(self) -> None:
        greedy = Sampling(temperature=0)
        try:
            item = self.prepare(ChatRequest(EXAMPLE if self.template else None, "Hello", sampling=greedy, max_tokens=4))
        except ItemError:  # a template may refuse the example, or leave no room for an answer
            item = self.prepare(ChatRequest(prompt=self._first(), sampling=greedy, max_tokens=4))
        self.run([item])

    def prepare(self, request: ChatRequest) -> ChatItem:
        ids = self._ids(request)
        if len(ids) >= self.max_tokens:
            raise ItemError(
                f"the prompt has {len(ids)} tokens, and the model's context is {self.max_tokens} with the answer; "
                "shorten the conversation",
                "messages" if request.messages is not None else "prompt",
                "context_length_exceeded",
            )
        unknown = next((id for id in ids if not 0 <= id < self.rows), None)
        if unknown is not None:
            raise ItemError(f"token {unknown} has no embedding: there are {self.rows}", "prompt")
        wrong = next((id for id in request.sampling.logit_bias if not 0 <= id < self.rows), None)
        if wrong is not None:
            raise ItemError(f"logit_bias names token {wrong}, but the model has {self.rows}", "logit_bias")
        room = self.max_tokens - len(ids)
        grammar, is_json, call_format = self._constraint(request)
        matcher = None if grammar is None else self._matcher(grammar, request)
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
        return Generation(item, self.ends, self._decode, self.grammar_tokens.decode_bytes, lambda: self.pace.room)

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

    def _ids(self, request: ChatRequest) -> list[int]:
        if request.messages is None:
            if isinstance(request.prompt, list):
                return request.prompt or self._first()
            self._check_length(request.prompt, "prompt")
            ids: list[int] = self.tokenizer.encode(request.prompt)
            return ids or self._first()
        if self.template is None:
            raise ItemError(
                "the checkpoint has no chat_template, so it can only continue texts; use POST /v1/completions",
                "messages",
            )
        messages, tools = request.messages, request.tools if request.tool_choice != "none" else []
        if tools and not self.template.takes_tools:
            if request.tool_choice != "auto":
                messages = [{"role": "system", "content": described(tools)}, *messages]
            tools = []
        text = self.template.render(messages, tools)
        self._check_length(text, "messages")
        return list(self.tokenizer.encode(text, add_special_tokens=False)) or self._first()

    def _check_length(self, text: str, field: str) -> None:
        """Raises ItemError if the text is certainly too long, which is known without tokenising it."""
        if len(text) > self.max_tokens * self._longest_token:
            raise ItemError(
                f"the prompt has {len(text)} characters, more than {self.max_tokens} tokens, the model's context with "
                "the answer, can have; shorten the conversation",
                field,
                "context_length_exceeded",
            )

    @functools.cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()))

    def _first(self) -> list[int]:
        first = self.tokenizer.bos_token_id
        return [min(self.ends) if first is None else first]

    def _constraint(self, request: ChatRequest) -> tuple[str | None, bool, CallFormat]:
        """The answer's grammar, if any; whether it makes the answer one JSON value; and how calls in it are found.

        Raises ItemError if the schemas are too long, or no schemas.
        """
        field = "tools" if request.schema is None else "response_format"
        schemas = request.schema if request.schema is not None else json.dumps(request.tools)
        if len(schemas) > LONGEST_SCHEMA:
            raise ItemError(f"the schema has over {LONGEST_SCHEMA} characters; simplify it", field)
        try:
            if request.schema is not None:
                return _grammar(request.schema), True, "none"
            if not request.tools or request.tool_choice == "none":
                return None, False, "none"
            if request.tool_choice != "auto":
                return grammar_of_calls(request.tools, request.tool_choice), True, "json"
            form = self.template.call_format if self.template else "none"
            is_token = OPEN in self.tokenizer.get_vocab()
            return grammar_of_tags(request.tools, is_token) if form == "hermes" else None, False, form
        except ValueError as error:
            raise ItemError(f"the schema can't be used: {error}", field) from error

    def _matcher(self, grammar: str, request: ChatRequest) -> LLMatcher:
        """Raises ItemError if the grammar can't be compiled."""
        matcher = LLMatcher(self.grammar_tokens, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().partition("\n")[0]
            field = "tools" if request.schema is None else "response_format"
            raise ItemError(f"the schema can't be used: {reason}", field)
        return matcher

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


@functools.lru_cache(maxsize=64)
def _grammar(schema: str) -> str:
    return str(LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT))


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The tokens that end an answer."""
    known = [model.generation_config.eos_token_id if model.generation_config else None, model.config.eos_token_id]
    lists = [each if isinstance(each, list) else [each] for each in (*known, tokenizer.eos_token_id)]
    ends = frozenset(id for each in lists for id in each if id is not None)
    if not ends:
        raise CheckpointError("neither the checkpoint's configs nor its tokenizer name a token that ends an answer")
    return ends


def _template(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate | None:
    source = tokenizer.chat_template
    if isinstance(source, dict):  # several, by name
        source = source.get("default")
    if not source:
        return None
    specials = {role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    try_out(source, specials)
    return ChatTemplate(source, specials)


def _defaults(model: PreTrainedModel) -> Sampling:
    """The sampling that the checkpoint's generation_config.json asks for."""
    known = model.generation_config.to_diff_dict() if model.generation_config else {}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    if known.get("do_sample") is False:
        return Sampling(repetition_penalty=known.get("repetition_penalty"))
    return Sampling(**{name: known[name] for name in names if known.get(name) is not None})
