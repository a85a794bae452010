"""Both chat dialects on the real ingress, with a fake model and the clients' own libraries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ollama
import openai
import pytest

from tests import ingress
from tests.ingress import Running


def called(arguments: str) -> list[Any]:
    function = {"name": "weather", "arguments": arguments}
    return [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}]


JSON = "Content-Type: application/json"
CHAT, TEXT, OLLAMA, GENERATE = "/v1/chat/completions", "/v1/completions", "/api/chat", "/api/generate"
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with ingress.running() as running:
        yield running


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


@pytest.fixture
def other(server: Running) -> ollama.Client:
    return ollama.Client(host=f"http://127.0.0.1:{server.port}")


def post(server: Running, path: str, **body: Any) -> Any:
    return server.post(path, json.dumps(body).encode(), JSON)


def asked(server: Running) -> Any:
    """The request that the model got last."""
    handle: Any = server.graph.models["chat"].handle
    return handle.asked[-1]


def test_openais_client_gets_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="chat", messages=HELLO, n=2, seed=4)  # type: ignore[call-overload]
    assert [choice.message.content for choice in answer.choices] == ["One word.", "One word."]
    assert (answer.choices[0].finish_reason, answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        "stop",
        5,
        4,
    )
    assert client.completions.create(model="chat", prompt="Once").choices[0].text == "One word."


def test_openais_client_gets_streams(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="chat",
            messages=HELLO,  # type: ignore[arg-type]
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert [delta.role for delta in deltas] == ["assistant", None, None, None]
    assert [delta.content for delta in deltas] == ["", "One ", "word.", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices] == [None, None, None, "stop"]
    assert chunks[-1].usage
    assert chunks[-1].choices == []
    texts = client.completions.create(model="chat", prompt="Once", stream=True)
    assert "".join(chunk.choices[0].text for chunk in texts) == "One word."


def test_a_stream_is_bytes_that_every_decoder_takes(server: Running) -> None:
    answer = post(server, CHAT, messages=HELLO, stream=True)
    events = answer.content.decode().split("\n\n")
    assert all(event.startswith("data: ") for event in events[:-1])
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[-3].removeprefix("data: "))["choices"][0]["delta"] == {}
    assert "usage" not in answer.content.decode()


def test_ollamas_client_gets_answers(other: ollama.Client) -> None:
    answer = other.chat(model="chat:latest", messages=HELLO, options={"temperature": 0, "num_ctx": 2048})
    assert (answer.message.content, answer.done, answer.done_reason) == ("One word.", True, "stop")
    parts = list(other.chat(model="chat", messages=HELLO, stream=True))
    assert [part.message.content for part in parts] == ["One ", "word.", ""]
    assert [part.done for part in parts] == [False, False, True]
    assert other.generate(model="chat", prompt="Hi", system="Be short.", keep_alive="5m").response == "One word."
    assert other.generate(model="chat", prompt="").done_reason == "load"
    assert other.chat(model="chat", messages=[]).done_reason == "load"


def test_ollamas_client_finds_models_that_it_can_use(other: ollama.Client) -> None:
    assert {model.model for model in other.list().models} == {"chat:latest", "embedder:latest"}
    assert {model.model for model in other.ps().models} == {"chat:latest", "embedder:latest"}
    assert other.show("chat:latest").capabilities == ["completion"]
    assert other.show("embedder").capabilities == ["embedding"]
    assert len(other.embed(model="embedder", input=["a", "b"]).embeddings) == 2
    assert len(other.embeddings(model="embedder", prompt="a").embedding) == 4
    with pytest.raises(ollama.ResponseError, match="no model 'nope'") as missing:
        other.show("nope")
    assert missing.value.status_code == 404


def test_fields_reach_the_model(server: Running) -> None:
    post(
        server,
        CHAT,
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}]},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {
                "name": "weather", "arguments": '{"city": "Seoul"}'}}]},
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
        ],
        temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, repetition_penalty=1.1,
        seed=7, logit_bias={"5": -100}, logprobs=True, top_logprobs=3, max_completion_tokens=9, stop="END",
        ignore_eos=True, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weather"}},
    )  # fmt: skip
    found = asked(server)
    assert [message["content"] for message in found.messages] == ["Be short.", "", "rain"]
    assert found.messages[0]["role"] == "system"
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Seoul"}
    known = found.sampling
    assert (known.temperature, known.top_p, known.top_k, known.min_p, known.repetition_penalty) == (
        0.5,
        0.9,
        0,
        0.1,
        1.1,
    )
    assert (known.seed, known.logit_bias, known.top_logprobs) == (7, {5: -100.0}, 3)
    assert (found.max_tokens, found.stops, found.ignore_eos, found.tool_choice) == (9, ("END",), True, "=weather")
    post(server, OLLAMA, messages=HELLO, stream=False, format={"type": "object"}, options={
        "temperature": 0.1, "num_predict": 5, "stop": ["a", "b"], "repeat_penalty": 1.2, "seed": 3})  # fmt: skip
    found = asked(server)
    assert (found.schema, found.max_tokens, found.stops) == ('{"type": "object"}', 5, ("a", "b"))
    assert (found.sampling.temperature, found.sampling.repetition_penalty, found.sampling.seed) == (0.1, 1.2, 3)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "Hello"}, "messages"),
        (CHAT, {"messages": [{"role": "usr", "content": "x"}]}, "messages.0.role"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
        (CHAT, {"messages": HELLO, "n": 10_000}, "n"),
        (CHAT, {"messages": HELLO, "stop": ["x"] * 10_000}, "stop"),
        (CHAT, {"messages": HELLO, "stop": [1]}, "stop"),
        (CHAT, {"messages": HELLO, "temperature": -1}, "temperature"),
        (CHAT, {"messages": HELLO, "top_p": 0}, "top_p"),
        (CHAT, {"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        (CHAT, {"messages": HELLO, "logit_bias": {"x": 1}}, "logit_bias"),
        (CHAT, {"messages": HELLO, "logit_bias": {"1": 1000}}, "logit_bias"),
        (CHAT, {"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, "response_format"),
        (CHAT, {"messages": HELLO, "tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        (CHAT, {"messages": HELLO, "modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"messages": HELLO, "repetition_penalty": 1e-39}, "repetition_penalty"),
        (CHAT, {"messages": called('{"a":"\\ud800"}')}, "messages.0.tool_calls.0.function.arguments.a"),
        (CHAT, {"messages": called('{"a":' * 400 + "1" + "}" * 400)}, "messages.0.tool_calls.0.function.arguments"),
        (CHAT, {"messages": HELLO, "tools": [TOOL], "tool_choice": {"function": {"name": "x"}}}, "tool_choice"),
        (TEXT, {"prompt": ["a", "b"]}, "prompt"),
        (TEXT, {"prompt": "a", "best_of": 3}, "best_of"),
    ],
)
def test_bad_fields_are_named(server: Running, path: str, body: dict[str, Any], param: str) -> None:
    answer = post(server, path, **body)
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, param, None)


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (CHAT, {"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template"),
        (CHAT, {"messages": HELLO, "functions": [{}]}, "functions"),
        (TEXT, {"prompt": "a", "suffix": "b"}, "suffix"),
        (TEXT, {"prompt": "a", "echo": True}, "echo"),
        (OLLAMA, {"messages": HELLO, "think": True}, "think"),
        (GENERATE, {"prompt": "a", "template": "x"}, "template"),
        (GENERATE, {"prompt": "a", "images": ["x"]}, "images"),
        (OLLAMA, {"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, "images"),
        (OLLAMA, {"messages": HELLO, "options": {"temperature": -1}}, "temperature"),
        (OLLAMA, {"messages": HELLO, "options": {"mirostat": 2}}, "mirostat"),
    ],
)
def test_what_can_not_be_honoured_is_refused_by_name(
    server: Running, path: str, body: dict[str, Any], named: str
) -> None:
    answer = post(server, path, **body)
    assert answer.status == 400
    assert named in answer.error["message"]
    if path in (OLLAMA, GENERATE):
        assert isinstance(answer.content["error"], str)


@pytest.mark.parametrize(("multiple", "status"), [(999983, 400), (12345.5, 400), (5, 200), (0.01, 200), (2.5e-7, 200)])
def test_a_schema_that_takes_long_to_compile_is_refused(server: Running, multiple: float, status: int) -> None:
    schema = {"anyOf": [{"type": "object"}, {"type": "number", "multipleOf": multiple}]}
    kind = {"type": "json_schema", "json_schema": {"name": "slow", "schema": schema}}
    assert post(server, CHAT, messages=HELLO, response_format=kind).status == status


def test_a_schema_nested_too_deeply_is_refused(server: Running) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(40):
        schema = {"type": "object", "properties": {"a": schema}}
    kind = {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}
    answer = post(server, CHAT, messages=HELLO, response_format=kind)
    assert answer.status == 400
    assert "nested" in answer.error["message"]


def test_nulls_and_unknown_fields_are_ignored(server: Running) -> None:
    body = {"messages": HELLO, "user": "x", "store": True, "metadata": {}, "temperature": None, "tools": None}
    assert post(server, CHAT, **body).status == 200


def test_events_of_dure_come_only_when_asked_for(server: Running) -> None:
    body = json.dumps({"messages": HELLO, "stream": True}).encode()
    plain = server.post(CHAT, body, JSON, "Accept: text/event-stream").content.decode()
    assert "event:" not in plain
    assert "id:" not in plain.replace('"id:', "")
