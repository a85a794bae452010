"""What JSON bodies make of nulls, and of many mistakes at once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from serve.http.requests import Body
from tests.ingress import json_endpoints

ENDPOINTS = json_endpoints()


def test_there_are_json_endpoints_to_look_at() -> None:
    assert {"/v1/embeddings", "/predict", "/v1/rerank", "/v1/models/shout/reload"} <= {path for path, _ in ENDPOINTS}


@pytest.mark.parametrize(("path", "model"), ENDPOINTS)
def test_null_is_the_same_as_leaving_out(path: str, model: type[Body]) -> None:
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    nulls = dict.fromkeys(model.model_fields)
    problems = {".".join(map(str, each["loc"])) for each in errors_of(model, nulls)}
    assert problems <= {*required, ""}  # "" is what holds for fields together
    assert required <= problems


@pytest.mark.parametrize(("path", "model"), ENDPOINTS)
def test_of_many_mistakes_one_is_collected(path: str, model: type[Body]) -> None:
    """A list of an error each would take up more memory than the body, and seconds."""
    for name in model.model_fields:
        found = errors_of(model, {name: [{"x": 1}] * 1000})
        assert len([each for each in found if each["loc"][:1] == (name,)]) <= 1
    unknown = errors_of(model, {f"k{number}": 1 for number in range(1000)})
    assert len(unknown) <= len(model.model_fields) + 1


def errors_of(model: type[Body], given: dict[str, Any]) -> list[Any]:
    try:
        model.model_validate_json(json.dumps(given))
    except ValidationError as error:
        return list(error.errors())
    return []
