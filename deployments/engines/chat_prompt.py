"""Turns requests into the prompts that a chat model reads."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from deployments.conversation import ChatRequest
from deployments.engines.chat_template import ChatTemplate, try_out
from deployments.engines.tool_calls import described
from deployments.spec import ItemError


class Prompts:
    """Conversations go through the checkpoint's template, texts are read as they are."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_tokens: int, end: int) -> None:
        """`max_tokens` is what a prompt and its answer may have together, `end` a token that ends answers.

        Raises CheckpointError if the checkpoint's template is not one, or takes too long.
        """
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.template = _template(tokenizer)
        begin = tokenizer.bos_token_id
        self.first = [end if begin is None else begin]
        """The prompt for an empty text."""
        self._longest_token = max(map(len, tokenizer.get_vocab()))

    def ids(self, request: ChatRequest) -> list[int]:
        """The tokens of the request's prompt, at least one. Raises ItemError if there is no place for it."""
        ids = self._ids(request)
        if len(ids) >= self.max_tokens:
            raise ItemError(
                f"the prompt has {len(ids)} tokens, and the model's context is {self.max_tokens} with the answer; "
                "shorten the conversation",
                "messages" if request.messages is not None else "prompt",
                "context_length_exceeded",
            )
        return ids

    def _ids(self, request: ChatRequest) -> list[int]:
        if request.messages is None:
            if isinstance(request.prompt, list):
                return request.prompt or self.first
            self._check_length(request.prompt, "prompt")
            ids: list[int] = self.tokenizer.encode(request.prompt)
            return ids or self.first
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
        return list(self.tokenizer.encode(text, add_special_tokens=False)) or self.first

    def _check_length(self, text: str, field: str) -> None:
        """Raises ItemError if the text is certainly too long, which is known without tokenising it."""
        if len(text) > self.max_tokens * self._longest_token:
            raise ItemError(
                f"the prompt has {len(text)} characters, more than {self.max_tokens} tokens, the model's context with "
                "the answer, can have; shorten the conversation",
                field,
                "context_length_exceeded",
            )


def _template(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate | None:
    source = tokenizer.chat_template
    if isinstance(source, dict):  # several, by name
        source = source.get("default")
    if not source:
        return None
    specials = {role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    try_out(source, specials)
    return ChatTemplate(source, specials)
