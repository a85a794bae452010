"""Parts of answers as OpenAI's APIs have them."""

from __future__ import annotations

import uuid
from typing import Any

from deployments.conversation import Reply, TokenLogprob, ToolCall


def message(reply: Reply) -> dict[str, Any]:
    text = reply.text
    said: dict[str, Any] = {"role": "assistant", "content": text if text or not reply.calls else None, "refusal": None}
    if reply.calls:
        said["tool_calls"] = [tool_call(call) for call in reply.calls]
    return said


def tool_call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def usage(found: list[Reply]) -> dict[str, Any]:
    """Tokens of the prompt, which all choices share, and of all answers."""
    prompt, written = found[0].prompt_tokens, sum(reply.tokens for reply in found)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": found[0].cached_tokens},
    }


def chat_logprobs(reply: Reply) -> list[dict[str, Any]]:
    return [entry(each) for piece in reply.pieces for each in piece.logprobs]


def entry(token: TokenLogprob) -> dict[str, Any]:
    """A token as the chat API reports it."""
    top = [{"token": text, "logprob": logprob, "bytes": list(raw)} for text, logprob, raw in token.top]
    return {
        "token": token.token,
        "logprob": token.logprob,
        "bytes": list(token.raw),
        "top_logprobs": top,
    }


def text_logprobs(reply: Reply) -> dict[str, Any]:
    """An answer's tokens as the completions API reports them."""
    tokens = [each for piece in reply.pieces for each in piece.logprobs]
    offsets, at = [], 0
    for each in tokens:
        offsets.append(at)
        at += len(each.token)
    return {
        "tokens": [each.token for each in tokens],
        "token_logprobs": [each.logprob for each in tokens],
        "top_logprobs": [{text: logprob for text, logprob, _ in each.top} for each in tokens],
        "text_offset": offsets,
    }
