"""What the routes share: the graph, request fields with their limits, and answers serialised once."""

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
"""After the deadline, for a service to say, and put on record, that it has passed."""

GraphDep = Annotated[Graph, Depends(_graph)]


async def _caller(request: Request, graph: GraphDep) -> Caller:
    return Caller.of(request.scope["headers"], graph.settings.request_timeout_s)


CallerDep = Annotated[Caller, Depends(_caller)]

SMALL_BYTES = 64 * 1024


class Body(BaseModel):
    """A JSON body. Fields that Dure does not know are ignored, as clients of other servers send some.

    Null is the same as nothing for a field that may be left out: many clients write all that they know of.
    """

    model_config = ConfigDict(extra="ignore")

    @classmethod
    def max_bytes(cls, limits: Limits) -> int:
        """What a request of this kind may have at most; over it 413. Those with texts or lists allow more."""
        return SMALL_BYTES

    @model_validator(mode="before")
    @classmethod
    def _prepared(cls, given: Any) -> Any:
        """Without nulls that mean nothing, and, where unknown fields are refused, with no more than one of them."""
        if not isinstance(given, dict):
            return given
        if None in given.values():
            given = {name: value for name, value in given.items() if value is not None or not cls._may_miss(name)}
        if cls.model_config.get("extra") == "forbid" and (unknown := given.keys() - cls._named().keys()):
            first = next(name for name in given if name in unknown)
            given = {name: value for name, value in given.items() if name == first or name not in unknown}
        return given

    @classmethod
    def _may_miss(cls, name: str) -> bool:
        field = cls._named().get(name)
        return field is not None and not field.is_required()

    @classmethod
    def _named(cls) -> dict[str, FieldInfo]:
        """The fields by the names that they have in JSON."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}


def answer(content: Any) -> Response:
    """A JSON response, numpy arrays and dataclasses included."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def check_texts(texts: list[str], param: str, limits: Limits) -> None:
    """Raises a DureError for a list that is empty or too long, and for a text that is too long."""
    if not texts:
        raise errors.invalid(f"{param} is empty", param)
    if len(texts) > limits.max_list_items:
        raise errors.invalid(
            f"{param} has {len(texts)} entries, more than {limits.max_list_items}; send several requests", param
        )
    for number, text in enumerate(texts):
        check_text(text, f"{param}.{number}", limits)


def check_text(text: str, param: str, limits: Limits) -> None:
    """Raises a DureError for a text that is too long or no Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise errors.invalid(f"{param} has half of a surrogate pair at character {error.start}", param) from error
    if len(text) > limits.max_text_chars:
        raise errors.too_large(f"{param} has {len(text)} characters, more than {limits.max_text_chars}", param)
