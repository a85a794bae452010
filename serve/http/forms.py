"""Multipart forms whose texts are read as their senders encoded them, or refused.

Starlette reads a text that is not UTF-8 as Latin-1, so Korean from an older program would reach a model as noise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from fastapi.routing import APIRoute
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from serve import errors
from serve.errors import DureError


class FormRoute(APIRoute):
    """The route class of endpoints that take forms."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def handle_form(request: Request) -> Any:
            try:
                return await handle(FormRequest(request.scope, request.receive))
            except HTTPException as error:
                if isinstance(error.__cause__, DureError):  # FastAPI hides what is wrong with a form
                    raise error.__cause__ from error
                raise

        return handle_form


class FormRequest(Request):
    async def _get_form(self, **bounds: Any) -> FormData:
        if self._form is None:
            async with aclosing(self.stream()) as stream:
                try:
                    self._form = await Parser(self.headers, stream, **bounds).parse()
                except MultiPartException as error:
                    raise errors.invalid(f"the form can't be read: {error.message}") from error
        return self._form


class Parser(MultiPartParser):
    """Raises a DureError for a text that is not in UTF-8, or not in the charset that its part names."""

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is None:
            charset = _charset(dict(part.item_headers).get(b"content-type", b""))
            try:
                text = bytes(part.data).decode(charset)
            except (UnicodeError, LookupError) as error:
                raise errors.invalid(f"{part.field_name} is not in {charset}; send UTF-8", part.field_name) from error
            self.items.append((part.field_name, text))
        else:
            super().on_part_end()


def _charset(content_type: bytes) -> str:
    _, options = parse_options_header(content_type)
    return options.get(b"charset", b"utf-8").decode("latin-1")[:40]
