"""What the routes share: the graph, request fields with their limits, and JSON responses."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from fastapi import Depends, Request, Response
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo

from serve import errors
from serve.caller import Caller
from serve.calls.graph import Graph
from serve.config.settings import Limits


async def _graph(request: Request) -> Graph:
    graph: Graph = request.app.state.graph
    return graph


GRACE_S = 5.0
"""Time after the deadline for a service to report and record that it has passed."""

GraphDep = Annotated[Graph, Depends(_graph)]


async def _caller(request: Request, graph: GraphDep) -> Caller:
    return Caller.of(request.scope["headers"], graph.settings.request_timeout_s)


CallerDep = Annotated[Caller, Depends(_caller)]

SMALL_BYTES = 64 * 1024


class Body(BaseModel):
    """A JSON body. Unknown fields are ignored, as clients of other servers send some.

    For an optional field null means absent, as many clients send every field that they know.
    """

    model_config = ConfigDict(extra="ignore")

    @classmethod
    def max_bytes(cls, limits: Limits) -> int:
        """Largest body of this kind; a larger one gets a 413. Bodies with texts or lists override this."""
        return SMALL_BYTES

    @model_validator(mode="before")
    @classmethod
    def _prepared(cls, given: Any) -> Any:
        """Drops nulls of optional fields. Where unknown fields are refused, keeps only the first of them."""
        if not isinstance(given, dict):
            return given
        if None in given.values():
            given = {name: value for name, value in given.items() if value is not None or not cls._is_optional(name)}
        if cls.model_config.get("extra") == "forbid" and (unknown := given.keys() - cls._fields_by_name().keys()):
            first = next(name for name in given if name in unknown)
            given = {name: value for name, value in given.items() if name == first or name not in unknown}
        return given

    @classmethod
    def _is_optional(cls, name: str) -> bool:
        field = cls._fields_by_name().get(name)
        return field is not None and not field.is_required()

    @classmethod
    def _fields_by_name(cls) -> dict[str, FieldInfo]:
        """The fields by their JSON names."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}


def answer(content: Any) -> Response:
    """A JSON response; the content may hold numpy arrays and dataclasses."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def check_texts(texts: list[str], param: str, limits: Limits) -> None:
    """Raises a DureError if the list is empty or too long, or a text is invalid."""
    if not texts:
        raise errors.invalid(f"{param} is empty", param)
    if len(texts) > limits.max_list_items:
        raise errors.invalid(
            f"{param} has {len(texts)} entries, more than {limits.max_list_items}; send several requests", param
        )
    for number, text in enumerate(texts):
        check_text(text, f"{param}.{number}", limits)


def check_text(text: str, param: str, limits: Limits) -> None:
    """Raises a DureError if the text is too long or not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise errors.invalid(f"{param} has half of a surrogate pair at character {error.start}", param) from error
    if len(text) > limits.max_text_chars:
        raise errors.too_large(f"{param} has {len(text)} characters, more than {limits.max_text_chars}", param)
