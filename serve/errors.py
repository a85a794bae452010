"""All refusals and failures that clients may see, and the shape that they share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LATE = "deadline_exceeded"
"""The kind of error if the deadline has passed."""
FILES = "files_unavailable"
"""The kind of error if image files can't be written or read."""


class DureError(Exception):
    """An error with its HTTP status and the message for the client. It can be pickled, to cross processes."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        param: str | None = None,
        retry_after_s: float | None = None,
        ticket: str | None = None,
        code: str | None = None,
    ) -> None:
        """`code` is what OpenAI's clients tell errors of one kind by."""
        super().__init__(status, kind, message, param, retry_after_s, ticket, code)
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.ticket = ticket
        self.code = code

    def __str__(self) -> str:
        return self.message

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds, at least 1, if a retry makes sense; the ticket to send with it, if any."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}
        return headers | ({"X-Dure-Ticket": self.ticket} if self.ticket else {})


def body(kind: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The JSON body of an error response."""
    error = {"type": kind, "message": message}
    return {"error": error | ({"param": param} if param else {})}


def problem_text(problem: Mapping[str, Any]) -> str:
    """The message of one of pydantic's errors, without the prefix that it puts before those raised by validators."""
    return str(problem["msg"]).removeprefix("Value error, ")


def invalid(message: str, param: str | None = None) -> DureError:
    return DureError(400, "invalid_request", message, param)


def not_found(message: str, param: str | None = None) -> DureError:
    return DureError(404, "not_found", message, param)


def conflict(message: str, param: str | None = None, retry_after_s: float | None = None) -> DureError:
    return DureError(409, "conflict", message, param, retry_after_s)


def gone() -> DureError:
    return DureError(499, "client_left", "the client left before the answer")


def no_files() -> DureError:
    return DureError(503, FILES, "image files can't be reached at the moment; send the request again", None, 2)


def no_room() -> DureError:
    problem = "images and their records can't be written: the disk is full or accepts no more data"
    return DureError(503, FILES, f"{problem}; delete old jobs, or send the request again later", None, 10)


def too_large(message: str, param: str | None = None) -> DureError:
    return DureError(413, "too_large", message, param)


def queue_full(name: str, waiting: int, retry_after_s: int, ticket: str | None) -> DureError:
    with_ticket = "; send X-Dure-Ticket then to go ahead of newcomers" if ticket else ""
    message = f"{name} has {waiting} waiting; retry in {retry_after_s} s{with_ticket}"
    return DureError(429, "queue_full", message, None, retry_after_s, ticket)


def at_capacity(name: str) -> DureError:
    """A limit other than a queue's is reached, so there is no ticket."""
    return DureError(429, "queue_full", f"{name} is at capacity; retry later", None, 1)


def overloaded(name: str, reason: str) -> DureError:
    """New requests are refused to spare the machine, even where queues have room."""
    return DureError(503, "overloaded", f"{name} accepts no new work: {reason}", None, 5)


def no_admission() -> DureError:
    return DureError(503, "unavailable", "admission does not answer; send the request again", None, 2)


def no_board() -> DureError:
    return DureError(503, "unavailable", "the board does not answer; send the request again", None, 2)


def loading(name: str, retry_after_s: float) -> DureError:
    return DureError(
        503, "loading", f"model {name} is still loading; see GET /model/upload-stream", None, retry_after_s
    )


def failed(name: str, reason: str) -> DureError:
    return DureError(503, "model_failed", f"model {name} could not be loaded: {reason}", None, 30)


def unavailable(name: str) -> DureError:
    return DureError(503, "unavailable", f"{name} lost its replica while answering; send the request again", None, 1)


def too_late(name: str, timeout_s: float) -> DureError:
    return DureError(504, LATE, f"{name} did not answer within {timeout_s:.3g} s")


def internal() -> DureError:
    return DureError(500, "internal", "internal error; the log has the reason under this request's id")
