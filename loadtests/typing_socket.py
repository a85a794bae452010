"""What a page does with its WebSocket while somebody types: it sends the text and waits for the next words."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from typing import Any

import gevent
from websocket import ABNF, WebSocket, WebSocketBadStatusException, WebSocketException, create_connection

from loadtests.visitor import PATIENCE_S, PAUSES, REFUSED, WRONG, Right, pause_asked

NAME = "/ws/{id}"
COME_BACK = (1012, 1013)
"""Close codes that mean: connect again."""
RECONNECT_S = 2.0


class Refused(Exception):
    """The request was refused; ask again after `pause_s`, if known."""

    def __init__(self, pause_s: float | None = None) -> None:
        super().__init__(pause_s)
        self.pause_s = pause_s


class WrongAnswer(Exception):
    """The answer is an error, or not a prediction."""


class TypingSocket:
    """A connection that is opened when needed, also after a loss.

    Each input is passed to `report`, Locust's event `request`, with the time until its predictions came.
    """

    def __init__(self, url: str, report: Callable[..., None]) -> None:
        self.url = f"{url.replace('http', 'ws', 1)}/ws/{uuid.uuid4()}"
        self.report = report
        self.socket: WebSocket | None = None

    def ask(self, text: str, right: Right) -> None:
        """Send the text and wait for the next words."""
        started = time.perf_counter()
        told: dict[str, Any] = {"request_type": "WS", "exception": None}
        pause_s = 0.0
        try:
            self._ask(text, right)
        except Refused as refused:
            told["request_type"] += REFUSED
            pause_s = refused.pause_s or RECONNECT_S
            if refused.pause_s is not None:
                PAUSES[NAME, "WS"].append(refused.pause_s)
        except (WebSocketException, OSError, WrongAnswer, *WRONG) as error:
            self.close()
            told["exception"] = error
            pause_s = RECONNECT_S
        took_ms = 1000 * (time.perf_counter() - started)
        self.report(name=NAME, response_time=took_ms, response_length=0, context={}, **told)
        gevent.sleep(pause_s)

    def close(self) -> None:
        if self.socket:
            self.socket.close(timeout=0)
            self.socket = None

    def _ask(self, text: str, right: Right) -> None:
        """Raises Refused, WrongAnswer, one of WRONG, WebSocketException or OSError."""
        self.socket = self.socket or self._connected()
        self.socket.send(json.dumps({"type": "input", "text": text, "id": text}))
        opcode, data = self.socket.recv_data()
        if opcode == ABNF.OPCODE_CLOSE:
            self.close()
            if (code := int.from_bytes(data[:2])) in COME_BACK:
                raise Refused
            raise WrongAnswer(f"closed with {code}: {data[2:].decode()}")
        answer = json.loads(data)
        if answer.get("type") == "error" and "retry_after" in answer:
            raise Refused(answer["retry_after"])
        if not (answer.get("input") == answer.get("id") == text and right(answer)):
            raise WrongAnswer(str(answer))

    def _connected(self) -> WebSocket:
        try:
            return create_connection(self.url, timeout=PATIENCE_S)
        except WebSocketBadStatusException as error:
            pause_s = pause_asked(error.status_code, (error.resp_headers or {}).get("retry-after"))
            if pause_s is None:
                raise
            raise Refused(pause_s) from error
