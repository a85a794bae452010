"""Values in JSON that an answer can't repeat."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import orjson
import pytest

from serve.http.json_values import unwritable
from serve.http.requests import Body
from tests.ingress import Running, json_endpoints, running

JSON, RUN = "Content-Type: application/json", "/v1/models/shout/run"
EVENTS = "Accept: text/event-stream"
WRITABLE = [
    "18446744073709551615",
    "-9223372036854775808",
    "1e308",
    "-0.0",
    '"\\ud83d\\ude00"',
    "1e-400",
    '"1e400"',
    '"NaN"',
]
UNWRITABLE = ["18446744073709551616", "-9223372036854775809", "9" * 4000, "1e400", "-1e999", "NaN", "-Infinity"]
UNREADABLE = ["9" * 5000, "9" * 50_000, "[" * 200 + "]" * 200, '"\\ud800"']


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(request_timeout_s=20) as started:
        yield started


@pytest.mark.parametrize("value", WRITABLE)
@pytest.mark.parametrize("item", ["{}", "[[{}]]", '{{"a": [1, {{"b": {}}}]}}'])
def test_what_can_be_written_comes_back(server: Running, item: str, value: str) -> None:
    body = f'{{"items": [{item.format(value)}]}}'.encode()
    answer = server.post(RUN, body, JSON)
    assert answer.status == 200
    assert answer.content["results"] == json.loads(body)["items"]


@pytest.mark.parametrize("value", UNWRITABLE)
@pytest.mark.parametrize(
    ("item", "at"),
    [("{}", ""), ("[[{}]]", ".0.0"), ('{{"a": [1, {{"b": {}}}]}}', ".a.1.b"), ('{{"a": "b", "c": {}}}', ".c")],
)
@pytest.mark.parametrize("more", [(), (EVENTS,)])
def test_what_cannot_be_written_is_named(
    server: Running, item: str, at: str, value: str, more: tuple[str, ...]
) -> None:
    answer = server.post(RUN, f'{{"items": [1, {item.format(value)}]}}'.encode(), JSON, *more)
    assert (answer.status, answer.error["param"]) == (400, f"items.1{at}")


@pytest.mark.parametrize("value", UNREADABLE)
def test_what_cannot_be_read_is_no_failure(server: Running, value: str) -> None:
    assert server.post(RUN, f'{{"items": [{value}]}}'.encode(), JSON).status in (400, 422)


FIELDS = [(path, model, name) for path, model in json_endpoints() for name in (*model.model_fields, "unknown")]


@pytest.mark.parametrize(("path", "model", "name"), FIELDS)
def test_no_value_of_any_field_is_a_failure(server: Running, path: str, model: type[Body], name: str) -> None:
    for value in (*UNWRITABLE, *UNREADABLE, '{"18446744073709551616": 1e400}', '[{"text": NaN}]', '"a"'):
        if (path, name, value) == ("/v1/models/shout/reload", "source", '"a"'):
            continue  # which is valid, and asks the board
        if path == "/v1/search" and (name == "unknown" or value == '"a"'):
            continue  # which is valid, and asks for a place in the lane
        known = {"items": "[1]", "input": '"a"', "query": '"a"', "documents": '["b"]', "text": '"a"'}
        fields = {key: known[key] for key in model.model_fields if key in known} | {name: value}
        body = "{" + ", ".join(f'"{key}": {each}' for key, each in fields.items()) + "}"
        answer = server.post(path, body.encode(), JSON)
        assert answer.status < 500 or answer.error["type"] == "unavailable", (path, body[:200], answer.content)


def test_a_key_with_half_of_a_surrogate_pair_is_found() -> None:
    assert unwritable({"a": [{"\ud800": 1}]}) == ("a.0", "has half of a surrogate pair in a key")
    assert unwritable(["a", "b\udfff"], "items") == ("items.1", "has half of a surrogate pair")


def test_long_lists_are_looked_through_quickly() -> None:
    items = [[list(range(500))] * 2 for _ in range(1000)]
    started = time.thread_time()
    assert unwritable(items) is None
    assert time.thread_time() - started < 2
    assert orjson.dumps(items)
