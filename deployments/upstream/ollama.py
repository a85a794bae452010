"""Ollama's API as an upstream: https://github.com/ollama/ollama/blob/main/docs/api.md."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from deployments.conversation import ChatRequest, TextPiece, ToolCall
from deployments.load_progress import LoadProgress
from deployments.messages import Refusal
from deployments.upstream.api import Api, End, UpstreamError

NANO = 1e9


class Ollama(Api):
    async def load(self, progress: LoadProgress) -> None:
        found = await self.get("/api/tags")
        names = {str(each.get("name")) for each in found.get("models", ())} if isinstance(found, dict) else set()
        wanted = self.upstream.model
        if not {wanted, f"{wanted}:latest"} & names:
            await self._pull(progress)
        async for line in self.lines("/api/chat", {"model": wanted, "messages": [], "stream": False}):
            self.parsed(line)

    async def _pull(self, progress: LoadProgress) -> None:
        """Have the model fetched, layer by layer. The largest by far is the first."""
        async for line in self.lines("/api/pull", {"model": self.upstream.model}):
            said = self.parsed(line)
            total, done = said.get("total"), said.get("completed", 0)
            if isinstance(total, int) and isinstance(done, int) and total > 0:
                progress.checkpoint(100 * done / total, 0, 1)
            await asyncio.sleep(0)

    async def probe(self) -> None:
        await self.get("/api/version")

    async def answer(self, request: ChatRequest) -> AsyncGenerator[TextPiece | End]:
        path, body = self._body(request)
        async for line in self.lines(path, body):
            said = self.parsed(line)
            message = said.get("message") if path == "/api/chat" else {"content": said.get("response")}
            if not isinstance(message, dict):
                raise self.garbage()
            if text := message.get("content"):
                yield TextPiece(str(text))
            for call in message.get("tool_calls") or ():
                yield TextPiece(call=_call(call, self))
            if said.get("done"):
                yield End(
                    str(said.get("done_reason") or "stop"),
                    int(said.get("prompt_eval_count") or 0),
                    0,
                    int(said.get("eval_count") or 0),
                    (said.get("prompt_eval_duration") or 0) / NANO,
                    (said.get("eval_duration") or 0) / NANO,
                )
                return
        raise UpstreamError(Refusal(f"{self.upstream.url} ended the answer in the middle; send it again", "lost"))

    def _body(self, request: ChatRequest) -> tuple[str, dict[str, Any]]:
        """Path and body of the request. Raises UpstreamError naming what Ollama can't do."""
        known = request.sampling
        unusable = {
            "logprobs": known.top_logprobs is not None,
            "logit_bias": bool(known.logit_bias),
            "ignore_eos": request.ignore_eos,
            "tool_choice": bool(request.tools) and request.tool_choice not in ("auto", "none"),
            "prompt": request.messages is None and isinstance(request.prompt, list),
        }
        if named := next((name for name, there in unusable.items() if there), None):
            raise UpstreamError(Refusal(f"{named} can't be used: the model runs in Ollama", "invalid", named))
        options = {
            "temperature": known.temperature,
            "top_p": known.top_p,
            "top_k": known.top_k,
            "min_p": known.min_p,
            "repeat_penalty": known.repetition_penalty,
            "frequency_penalty": known.frequency_penalty or None,
            "presence_penalty": known.presence_penalty or None,
            "seed": known.seed,
            "num_predict": request.max_tokens,
            "stop": list(request.stops) or None,
        }
        body: dict[str, Any] = {
            "model": self.upstream.model,
            "stream": True,
            "options": {name: value for name, value in options.items() if value is not None},
        }
        if request.schema is not None:
            body["format"] = json.loads(request.schema)
        if request.messages is None:
            return "/api/generate", body | {"prompt": request.prompt, "raw": True}
        if request.tools and request.tool_choice != "none":
            body["tools"] = request.tools
        return "/api/chat", body | {"messages": request.messages}


def _call(call: Any, api: Api) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise api.garbage()
    arguments = function.get("arguments")
    written = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    return ToolCall(function["name"], written)
