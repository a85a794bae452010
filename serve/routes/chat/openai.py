"""OpenAI's APIs for chat and for completions."""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Response
from pydantic import Field, PlainValidator, model_validator

from deployments.conversation import ChatRequest, Sampling
from serve import errors
from serve.calls.chat import MOST_CHOICES, replies
from serve.config.settings import Limits
from serve.http.early import calls
from serve.http.requests import Body, CallerDep, GraphDep, answer, check_text
from serve.routes.chat import conversations
from serve.routes.chat.shapes import chat_logprobs, message, text_logprobs, usage
from serve.routes.chat.streams import ChatChunks, TextChunks, response

router = APIRouter(tags=["chat"])

LARGEST_SEED = 2**63 - 1

Count = Annotated[int, Field(ge=1, strict=True)]


class Generating(Body):
    """What both APIs have."""

    UNUSABLE: ClassVar[tuple[str, ...]] = ()
    """Fields that would change the answer, and can't be honoured."""

    model: str | None = None
    stream: bool = False
    stream_options: dict[str, Any] = Field(default_factory=dict)
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES, strict=True)] = 1
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=10**6, strict=True)] | None = None
    """Extension: 0 or -1 is no bound."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Extension."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """Extension."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Any = None
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED, strict=True)] | None = None
    stop: Any = None
    max_tokens: Count | None = None
    ignore_eos: bool = False
    """Extension: write on until max_tokens."""

    @classmethod
    def max_bytes(cls, limits: Limits) -> int:
        return limits.max_body_bytes

    @model_validator(mode="before")
    @classmethod
    def _usable(cls, given: Any) -> Any:
        if isinstance(given, dict):
            unusable = next((name for name in cls.UNUSABLE if given.get(name) not in (None, [], {}, False)), None)
            if unusable:
                raise ValueError(f"{unusable} can't be used here; leave it out")
        return given

    @property
    def with_usage(self) -> bool:
        return bool(self.stream_options.get("include_usage"))

    def sampling(self, top_logprobs: int | None) -> Sampling:
        return Sampling(
            self.temperature,
            self.top_p,
            None if self.top_k is None else max(0, self.top_k),
            self.min_p,
            self.frequency_penalty,
            self.presence_penalty,
            self.repetition_penalty,
            conversations.biases_of(self.logit_bias),
            None if self.seed is None else abs(self.seed),
            top_logprobs,
        )


class ChatCompletionRequest(Generating):
    UNUSABLE = (
        *("functions", "function_call", "audio", "web_search_options", "chat_template", "chat_template_kwargs"),
        *("continue_final_message", "documents", "guided_regex", "guided_grammar", "guided_choice"),
    )

    messages: list[Any]
    """Contents are texts, or lists of parts of type text."""
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20, strict=True)] | None = None
    response_format: dict[str, Any] | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    modalities: Any = None

    def request(self, limits: Limits) -> ChatRequest:
        """Raises DureError naming the field that can't be used."""
        messages = conversations.messages_of(self.messages, limits)
        if not messages:
            raise errors.invalid("messages is empty", "messages")
        if self.top_logprobs is not None and not self.logprobs:
            raise errors.invalid("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.modalities not in (None, ["text"]):
            raise errors.invalid("modalities takes text only", "modalities")
        tools = conversations.tools_of(self.tools) if self.tools else []
        choice = conversations.tool_choice_of(self.tool_choice, tools)
        schema = _schema(self.response_format)
        if schema is not None and tools and choice != "none":
            raise errors.invalid("response_format can't be used together with tools", "response_format")
        return ChatRequest(
            messages,
            tools=tools,
            tool_choice=choice,
            schema=schema,
            sampling=self.sampling((self.top_logprobs or 0) if self.logprobs else None),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            stops=conversations.stops_of(self.stop),
            ignore_eos=self.ignore_eos,
            parallel_calls=self.parallel_tool_calls,
        )


Prompt = str | list[int]


def _prompt(given: Any) -> Prompt:
    """Validates by hand, as pydantic would collect errors for every entry of a long list."""
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str | list):
        [given] = given
    if isinstance(given, str) or (isinstance(given, list) and {type(each) for each in given} <= {int}):
        return given
    raise ValueError("takes one text, or one list of token ids; send several requests for several texts")


class CompletionRequest(Generating):
    UNUSABLE = ("suffix", "echo")

    prompt: Annotated[Prompt, PlainValidator(_prompt, json_schema_input_type=Prompt)]
    max_tokens: Count | None = 16
    """As in OpenAI's API."""
    logprobs: Annotated[int, Field(ge=0, le=20, strict=True)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    def request(self, limits: Limits) -> ChatRequest:
        """Raises DureError naming the field that can't be used."""
        if self.best_of is not None and self.best_of != self.n:
            raise errors.invalid("best_of can't be used here; leave it out", "best_of")
        if isinstance(self.prompt, str):
            check_text(self.prompt, "prompt", limits)
        return ChatRequest(
            prompt=self.prompt,
            sampling=self.sampling(self.logprobs),
            max_tokens=self.max_tokens,
            stops=conversations.stops_of(self.stop),
            ignore_eos=self.ignore_eos,
        )


@router.post("/v1/chat/completions")
@calls(task="chat")
async def chat_completions(body: ChatCompletionRequest, graph: GraphDep, caller: CallerDep) -> Response:
    """Answers a conversation. `stream` sends the answer as it is written."""
    model = graph.model("chat", body.model)
    request = body.request(graph.settings.limits)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}
    if body.stream:
        chunks = ChatChunks(head | {"object": "chat.completion.chunk"}, body.n, body.with_usage, body.logprobs)
        return await response(graph, model, request, body.n, caller, chunks)
    found = await replies(graph, model, request, body.n, caller)
    choices = [
        {
            "index": index,
            "message": message(reply),
            "logprobs": {"content": chat_logprobs(reply), "refusal": None} if body.logprobs else None,
            "finish_reason": reply.finish,
        }
        for index, reply in enumerate(found)
    ]
    return answer(head | {"object": "chat.completion", "choices": choices, "usage": usage(found)})


@router.post("/v1/completions")
@calls(task="chat")
async def completions(body: CompletionRequest, graph: GraphDep, caller: CallerDep) -> Response:
    """Continues a text, which no chat template changes."""
    model = graph.model("chat", body.model)
    request = body.request(graph.settings.limits)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.name,
    }
    if body.stream:
        chunks = TextChunks(head, body.n, body.with_usage, body.logprobs is not None)
        return await response(graph, model, request, body.n, caller, chunks)
    found = await replies(graph, model, request, body.n, caller)
    choices = [
        {
            "index": index,
            "text": reply.text,
            "logprobs": text_logprobs(reply) if body.logprobs is not None else None,
            "finish_reason": reply.finish,
        }
        for index, reply in enumerate(found)
    ]
    return answer(head | {"choices": choices, "usage": usage(found)})


def _schema(response_format: dict[str, Any] | None) -> str | None:
    """The schema that an answer has to match. Raises DureError for formats that are unknown."""
    kind = (response_format or {"type": "text"}).get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return '{"type":"object"}'
    described = (response_format or {}).get("json_schema")
    if kind != "json_schema" or not isinstance(described, dict):
        raise errors.invalid(
            "response_format.type takes text, json_object, or json_schema with an object json_schema", "response_format"
        )
    schema = described.get("schema") or {"type": "object"}
    conversations.check_schema(schema, "response_format.json_schema.schema")
    return json.dumps(schema)
