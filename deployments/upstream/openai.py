"""OpenAI's API as an upstream: vLLM, llama-server, TGI, or another Dure."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from deployments.conversation import ChatRequest, TextPiece, TokenLogprob, ToolCall
from deployments.load_progress import LoadProgress
from deployments.messages import Refusal
from deployments.upstream.api import Api, End, UpstreamError

DATA, DONE = "data:", "[DONE]"


class OpenAI(Api):
    async def load(self, progress: LoadProgress) -> None:
        await self.probe()

    async def probe(self) -> None:
        await self.get("/v1/models")

    async def answer(self, request: ChatRequest) -> AsyncGenerator[TextPiece | End]:
        chat = request.messages is not None
        started, first_at = time.monotonic(), 0.0
        calls: dict[int, list[str]] = {}
        finish = ""
        usage: dict[str, Any] = {}
        ended = False
        async for line in self.lines("/v1/chat/completions" if chat else "/v1/completions", self._body(request)):
            if not line.startswith(DATA):
                continue
            content = line.removeprefix(DATA).strip()
            if content == DONE:
                ended = True
                break
            said = self.parsed(content)
            usage = said.get("usage") or usage
            for choice in said.get("choices") or ():
                finish = choice.get("finish_reason") or finish
                delta = (choice.get("delta") or {}) if chat else choice
                text = str(delta.get("content" if chat else "text") or "")
                logprobs = _logprobs(choice.get("logprobs")) if request.sampling.top_logprobs is not None else ()
                if text or logprobs:
                    first_at = first_at or time.monotonic()
                    yield TextPiece(text, None, logprobs)
                for call in delta.get("tool_calls") or ():
                    _collect(calls, call)
        if not ended and not finish:
            raise UpstreamError(Refusal(f"{self.upstream.url} ended the answer in the middle; send it again", "lost"))
        for _, (name, arguments) in sorted(calls.items()):
            yield TextPiece(call=ToolCall(name, arguments or "{}"))
        now = time.monotonic()
        details = usage.get("prompt_tokens_details") or {}
        yield End(
            finish,
            int(usage.get("prompt_tokens") or 0),
            int(details.get("cached_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
            (first_at or now) - started,
            now - (first_at or now),
        )

    def _body(self, request: ChatRequest) -> dict[str, Any]:
        known = request.sampling
        fields: dict[str, Any] = {
            "temperature": known.temperature,
            "top_p": known.top_p,
            "top_k": known.top_k,
            "min_p": known.min_p,
            "repetition_penalty": known.repetition_penalty,
            "frequency_penalty": known.frequency_penalty or None,
            "presence_penalty": known.presence_penalty or None,
            "logit_bias": {str(token): bias for token, bias in known.logit_bias.items()} or None,
            "seed": known.seed,
            "max_tokens": request.max_tokens,
            "stop": list(request.stops) or None,
            "ignore_eos": request.ignore_eos or None,
            "parallel_tool_calls": None if request.parallel_calls else False,
        }
        body = {name: value for name, value in fields.items() if value is not None}
        body |= {"model": self.upstream.model, "stream": True, "stream_options": {"include_usage": True}}
        if request.messages is None:
            body["prompt"] = request.prompt
            return body | ({} if known.top_logprobs is None else {"logprobs": known.top_logprobs})
        body["messages"] = [_message(message) for message in request.messages]
        if known.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": known.top_logprobs}
        if request.schema is not None:
            described = {"name": "answer", "schema": json.loads(request.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": described}
        if request.tools:
            choice = request.tool_choice
            named = {"type": "function", "function": {"name": choice[1:]}}
            body |= {"tools": request.tools, "tool_choice": named if choice.startswith("=") else choice}
        return body


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the arguments of its calls as JSON."""
    if "tool_calls" not in message:
        return message
    calls = []
    for number, call in enumerate(message["tool_calls"]):
        function = call["function"]
        arguments = function["arguments"]
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({"id": f"call_{number}", **call, "function": {"name": function["name"], "arguments": written}})
    return {**message, "tool_calls": calls}


def _collect(calls: dict[int, list[str]], call: dict[str, Any]) -> None:
    """Add a part of a call: its name comes once, its arguments piece by piece."""
    known = calls.setdefault(int(call.get("index") or 0), ["", ""])
    function = call.get("function") or {}
    known[0] = known[0] or str(function.get("name") or "")
    known[1] += str(function.get("arguments") or "")


def _token(given: dict[str, Any]) -> tuple[str, float, bytes]:
    text = str(given.get("token"))
    return text, float(given.get("logprob") or 0), bytes(given.get("bytes") or text.encode())


def _logprobs(given: Any) -> tuple[TokenLogprob, ...]:
    entries = given.get("content") if isinstance(given, dict) else None
    return tuple(
        TokenLogprob(
            *_token(each),
            tuple(_token(top) for top in each.get("top_logprobs") or ()),
        )
        for each in entries or ()
    )
