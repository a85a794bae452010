"""The part of Ollama's API that its clients need to chat and to embed."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from pydantic import Field, PlainValidator, model_validator

from deployments.conversation import ChatRequest, Reply, Sampling, ToolCall
from deployments.messages import Embeddings, Text
from serve import errors
from serve.caller import Caller
from serve.calls.chat import Written, replies, streamed
from serve.calls.graph import Graph
from serve.calls.model import Model
from serve.config.settings import Limits
from serve.errors import DureError
from serve.http import sse
from serve.http.early import calls
from serve.http.requests import Body, CallerDep, GraphDep, answer, check_text, check_texts
from serve.metrics import measured
from serve.routes.chat import conversations
from serve.routes.chat.ollama_models import Named
from serve.routes.chat.streams import first_of, resumed
from serve.routes.embeddings import shortened

logger = logging.getLogger("ray.serve")

router = APIRouter(prefix="/api", tags=["chat"])

NANO = 10**9


class Generating(Named):
    stream: bool = True
    options: dict[str, Any] = Field(default_factory=dict)
    format: Any = None
    think: Any = None

    @classmethod
    def max_bytes(cls, limits: Limits) -> int:
        return limits.max_body_bytes

    @model_validator(mode="before")
    @classmethod
    def _usable(cls, given: Any) -> Any:
        if isinstance(given, dict):
            if given.get("think"):
                raise ValueError("think can't be used: the model does not think")
            unusable = next((name for name in ("suffix", "template", "images") if given.get(name)), None)
            if unusable:
                raise ValueError(f"{unusable} can't be used here; leave it out")
        return given

    def generating(self) -> dict[str, Any]:
        """The fields of a ChatRequest that options and format set. Raises DureError naming what can't be used."""
        known = Options.model_validate(self.options)
        return {
            "schema": self._schema(),
            "sampling": known.sampling(),
            "max_tokens": known.num_predict if known.num_predict and known.num_predict > 0 else None,
            "stops": conversations.stops_of(known.stop),
        }

    def _schema(self) -> str | None:
        if self.format in (None, ""):
            return None
        if self.format == "json":
            return '{"type":"object"}'
        conversations.check_schema(self.format, "format")
        return json.dumps(self.format)


class Options(Body):
    """Ollama's options. Others, such as those about how a model is loaded, are ignored."""

    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=10**6)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: int | None = None
    num_predict: Annotated[int, Field(ge=-2)] | None = None
    """-1 and -2: as many as there is room for."""
    stop: Any = None
    mirostat: int | None = None
    typical_p: float | None = None

    @model_validator(mode="after")
    def _known(self) -> Options:
        if self.mirostat:
            raise ValueError("mirostat can't be used; leave it out")
        if self.typical_p not in (None, 1):
            raise ValueError("typical_p can't be used; leave it out")
        return self

    def sampling(self) -> Sampling:
        return Sampling(
            self.temperature,
            self.top_p,
            self.top_k,
            self.min_p,
            self.frequency_penalty,
            self.presence_penalty,
            self.repeat_penalty,
            seed=abs(self.seed) if self.seed else None,
        )


class OllamaChatRequest(Generating):
    messages: list[Any] = Field(default_factory=list)
    tools: Any = None


class GenerateRequest(Generating):
    prompt: str = ""
    system: str | None = None
    raw: bool = False


Texts = str | list[str]


def _texts(given: Any) -> Texts:
    """Validates by hand, as pydantic would collect errors for every entry of a long list."""
    if isinstance(given, str) or (isinstance(given, list) and {type(each) for each in given} <= {str}):
        return given
    raise ValueError("takes a text or a list of texts")


class EmbedRequest(Named):
    input: Annotated[Texts, PlainValidator(_texts, json_schema_input_type=Texts)]
    truncate: bool = True
    dimensions: Annotated[int, Field(ge=1)] | None = None

    @classmethod
    def max_bytes(cls, limits: Limits) -> int:
        return limits.max_body_bytes


class EmbeddingsRequest(Named):
    prompt: str

    @classmethod
    def max_bytes(cls, limits: Limits) -> int:
        return limits.max_body_bytes


@router.post("/chat")
@calls(task="chat")
async def chat(body: OllamaChatRequest, graph: GraphDep, caller: CallerDep) -> Response:
    """Answers a conversation, as lines of JSON unless `stream` is false."""
    model = body.model_of("chat", graph)
    messages = conversations.messages_of(body.messages, graph.settings.limits)

    def shape(text: str, tool_calls: list[ToolCall]) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant", "content": text}
        if tool_calls:
            said["tool_calls"] = [_call(call) for call in tool_calls]
        return {"message": said}

    if not messages:
        return answer(_line(model, shape("", []), done=True, done_reason="load"))
    tools = conversations.tools_of(body.tools) if body.tools else []
    return await _respond(graph, model, ChatRequest(messages, tools=tools, **body.generating()), body, caller, shape)


@router.post("/generate")
@calls(task="chat")
async def generate(body: GenerateRequest, graph: GraphDep, caller: CallerDep) -> Response:
    """Answers a prompt. With `raw`, continues it, without the model's template."""
    model = body.model_of("chat", graph)
    check_text(body.prompt, "prompt", graph.settings.limits)
    check_text(body.system or "", "system", graph.settings.limits)

    def shape(text: str, _: list[ToolCall]) -> dict[str, Any]:
        return {"response": text}

    if not body.prompt:
        return answer(_line(model, shape("", []), done=True, done_reason="load"))
    if body.raw:
        request = ChatRequest(prompt=body.prompt, **body.generating())
    else:
        system = [{"role": "system", "content": body.system}] if body.system else []
        request = ChatRequest([*system, {"role": "user", "content": body.prompt}], **body.generating())
    return await _respond(graph, model, request, body, caller, shape)


@router.post("/embed")
@calls(task="embedding")
async def embed(body: EmbedRequest, graph: GraphDep, caller: CallerDep) -> Response:
    """Vectors of texts."""
    model = body.model_of("embedding", graph)
    texts = [body.input] if isinstance(body.input, str) else body.input
    found = await _embedded(model, texts, body.truncate, graph, caller)
    tokens = int(found.tokens.sum())
    vectors = shortened(found.vectors, body.dimensions)
    return answer({"model": model.name, "embeddings": vectors, "prompt_eval_count": tokens})


@router.post("/embeddings")
@calls(task="embedding")
async def embeddings(body: EmbeddingsRequest, graph: GraphDep, caller: CallerDep) -> Response:
    """The vector of one text, as older clients ask for it."""
    model = body.model_of("embedding", graph)
    found = await _embedded(model, [body.prompt], True, graph, caller)
    return answer({"embedding": found.vectors[0]})


async def _embedded(model: Model, texts: list[str], truncate: bool, graph: Graph, caller: Caller) -> Embeddings:
    check_texts(texts, "input", graph.settings.limits)
    with measured(model.name):
        found: Embeddings = await model.results([Text(text, truncate) for text in texts], caller, "input")
    return found


async def _respond(
    graph: Graph,
    model: Model,
    request: ChatRequest,
    body: Generating,
    caller: Caller,
    shape: Callable[[str, list[ToolCall]], dict[str, Any]],
) -> Response:
    if body.stream:
        updates = streamed(graph, model, request, 1, caller)
        first = await first_of(updates)
        lines = _lines(resumed(first, updates), model, shape)
        return StreamingResponse(lines, 200, sse.HEADERS, "application/x-ndjson")
    [reply] = await replies(graph, model, request, 1, caller)
    return answer(_line(model, shape(reply.text, reply.calls), **_end(reply)))


async def _lines(
    updates: Any, model: Model, shape: Callable[[str, list[ToolCall]], dict[str, Any]]
) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(updates):
        try:
            async for update in updates:
                if isinstance(update, Written):
                    text = "".join(piece.text for piece in update.pieces)
                    tool_calls = [piece.call for piece in update.pieces if piece.call]
                    if text or tool_calls:
                        yield _json_line(_line(model, shape(text, tool_calls), done=False))
                elif isinstance(update, list):
                    yield _json_line(_line(model, shape("", []), **_end(update[0])))
        except DureError as error:
            yield _json_line({"error": error.message})
        except Exception:  # the client gets no traceback; the log does
            logger.exception("a streamed answer failed")
            yield _json_line({"error": errors.internal().message})


def _json_line(content: dict[str, Any]) -> bytes:
    return orjson.dumps(content) + b"\n"


def _line(model: Model, said: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": model.name, "created_at": datetime.now(UTC).isoformat(), **said, **more}


def _end(reply: Reply) -> dict[str, Any]:
    """The last line's fields. Durations are in nanoseconds."""
    prompt, written = int(reply.prompt_seconds * NANO), int(reply.seconds * NANO)
    return {
        "done": True,
        "done_reason": "length" if reply.finish == "length" else "stop",
        "total_duration": prompt + written,
        "load_duration": 0,
        "prompt_eval_count": reply.prompt_tokens,
        "prompt_eval_duration": prompt,
        "eval_count": reply.tokens,
        "eval_duration": written,
    }


def _call(call: ToolCall) -> dict[str, Any]:
    """A call with its arguments as an object."""
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        arguments = {}
    return {"function": {"name": call.name, "arguments": arguments}}
