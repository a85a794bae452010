"""Makes the grammars that hold a chat model's answers to schemas and to the schemas of tools."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable

import llguidance.hf
from llguidance import LLMatcher
from transformers import PreTrainedTokenizerFast

from deployments.conversation import ChatRequest
from deployments.engines.chat_template import CallFormat
from deployments.engines.grammar import COMPACT
from deployments.engines.tool_calls import OPEN, grammar_of_calls, grammar_of_tags
from deployments.spec import ItemError

LONGEST_SCHEMA = 256 * 1024
"""Characters of a JSON schema, or of all tools' schemas."""


class Grammars:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, ends: Iterable[int], call_format: CallFormat) -> None:
        """`ends` are the tokens that end an answer, `call_format` is how the model writes calls of tools."""
        self.tokens = llguidance.hf.from_tokenizer(tokenizer, eos_token=sorted(ends))
        self.has_tag = OPEN in tokenizer.get_vocab()
        """The tag that opens a call is a token of its own."""
        self.call_format = call_format

    def of(self, request: ChatRequest) -> tuple[LLMatcher | None, bool, CallFormat]:
        """The answer's grammar, if any; whether it makes the answer one JSON value; and how calls in it are found.

        Raises ItemError if the schemas are too long, are no schemas, or can't be compiled.
        """
        grammar, is_json, call_format = self._grammar(request)
        return None if grammar is None else self._matcher(grammar, request), is_json, call_format

    def _grammar(self, request: ChatRequest) -> tuple[str | None, bool, CallFormat]:
        """As `of`, but not compiled."""
        field = "tools" if request.schema is None else "response_format"
        schemas = request.schema if request.schema is not None else json.dumps(request.tools)
        if len(schemas) > LONGEST_SCHEMA:
            raise ItemError(f"the schema has over {LONGEST_SCHEMA} characters; simplify it", field)
        try:
            if request.schema is not None:
                return _of_schema(request.schema), True, "none"
            if not request.tools or request.tool_choice == "none":
                return None, False, "none"
            if request.tool_choice != "auto":
                return grammar_of_calls(request.tools, request.tool_choice), True, "json"
            form = self.call_format
            return grammar_of_tags(request.tools, self.has_tag) if form == "hermes" else None, False, form
        except ValueError as error:
            raise ItemError(f"the schema can't be used: {error}", field) from error

    def _matcher(self, grammar: str, request: ChatRequest) -> LLMatcher:
        """Raises ItemError if the grammar can't be compiled."""
        matcher = LLMatcher(self.tokens, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().partition("\n")[0]
            field = "tools" if request.schema is None else "response_format"
            raise ItemError(f"the schema can't be used: {reason}", field)
        return matcher


@functools.lru_cache(maxsize=64)
def _of_schema(schema: str) -> str:
    return str(LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT))
