"""What the routes share: the graph, request fields with their limits, and answers serialised once."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from fastapi import Depends, Request, Response
from pydantic import BaseModel, ConfigDict

from serve import errors
from serve.caller import Caller
from serve.graph import Graph
from serve.settings import Limits


async def _graph(request: Request) -> Graph:
    graph: Graph = request.app.state.graph
    return graph


GRACE_S = 5.0
"""After the deadline, for a service to say, and put on record, that it has passed."""

GraphDep = Annotated[Graph, Depends(_graph)]


async def _caller(request: Request, graph: GraphDep) -> Caller:
    return Caller.of(request.scope["headers"], graph.settings.request_timeout_s)


CallerDep = Annotated[Caller, Depends(_caller)]


class Body(BaseModel):
    """A JSON body. Fields that Dure does not know are ignored, as clients of other servers send some."""

    model_config = ConfigDict(extra="ignore")


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
