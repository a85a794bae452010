"""Bounds on WebSockets, as a client that keeps to no rules meets them."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.ingress import Running, running

MAX_CHARS = 100_000
MAX_BYTES = 12 * MAX_CHARS + 4096
TEXT, CONTINUED, PING, CLOSE = 1, 0, 9, 8


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(limits={"max_text_chars": MAX_CHARS}, websocket={"max_mb_per_s": 2}) as started:
        yield started


@contextmanager
def connected(server: Running) -> Iterator[ClientConnection]:
    with connect(f"ws://127.0.0.1:{server.port}/ws/somebody", max_size=None) as connection:
        yield connection


def ask(connection: ClientConnection, **message: Any) -> Any:
    connection.send(json.dumps({"type": "input", **message}))
    return json.loads(connection.recv(timeout=10))


def frame(kind: int, data: bytes, last: bool = True) -> bytes:
    """As a client sends it, masked with zeros."""
    head = bytes([(0x80 if last else 0) | kind])
    if len(data) < 126:
        return head + bytes([0x80 | len(data)]) + bytes(4) + data
    return head + bytes([0x80 | 127]) + struct.pack(">Q", len(data)) + bytes(4) + data


@contextmanager
def raw(server: Running, *headers: str) -> Iterator[tuple[socket.socket, bytes]]:
    """A connection and the head of what it was answered with."""
    key = base64.b64encode(os.urandom(16)).decode()
    head = ["GET /ws/somebody HTTP/1.1", "Host: dure", "Upgrade: websocket", "Connection: Upgrade"]
    head += ["Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}", *headers, "", ""]
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall("\r\n".join(head).encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += connection.recv(4096)
        yield connection, answer


def closed_with(connection: socket.socket, sent: bytes, times: int = 1) -> tuple[int, str]:
    """The code and reason that the server closes with, while the client goes on sending."""

    def send() -> None:
        try:
            for _ in range(times):
                connection.sendall(sent)
        except OSError:
            pass

    sending = threading.Thread(target=send, daemon=True)
    sending.start()
    received = b""
    while part := connection.recv(65536):
        received += part
        at = received.rfind(bytes([0x80 | CLOSE]))
        if at >= 0 and len(received) >= at + 2 + received[at + 1]:
            return int.from_bytes(received[at + 2 : at + 4], "big"), received[at + 4 :].decode()
    raise AssertionError(f"closed without a reason after {received[-100:]!r}")


def test_messages_are_not_compressed(server: Running) -> None:
    with raw(server, "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits") as (_, head):
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"sec-websocket-extensions" not in head.lower()
    compressed = bytes([0xC0 | TEXT, 0x80 | 5]) + bytes(4) + b"\xaa\x56\x4a\x54\x00"
    with raw(server) as (connection, _):
        assert closed_with(connection, compressed)[0] == 1002


def test_a_text_at_its_limit_passes_however_it_is_written(server: Running) -> None:
    for text in ("가" * MAX_CHARS, "😀" * MAX_CHARS):
        with connected(server) as connection:
            assert ask(connection, text=text, top_k=None)["type"] == "prediction"
            assert "characters" in ask(connection, text=text + "a")["message"]


@pytest.mark.parametrize("fragment", [MAX_BYTES + 1, 15_000_000, 60_000])
def test_a_message_over_the_limit_closes_before_it_is_whole(server: Running, fragment: int) -> None:
    first = frame(TEXT, b"x" * fragment, last=False)
    with raw(server) as (connection, _):
        connection.sendall(first)
        code, reason = closed_with(connection, frame(CONTINUED, b"x" * fragment, last=False), 25)
    assert code == 1009
    assert str(MAX_BYTES) in reason


@pytest.mark.parametrize(
    "sent",
    [
        frame(PING, b""),
        frame(PING, b"x" * 125) * 500,
        frame(TEXT, b"", last=False) + frame(CONTINUED, b"", last=False) * 5000,
        frame(TEXT, b'{"type": "ping"}') * 2000,
    ],
)
def test_frames_without_end_are_closed_upon(server: Running, sent: bytes) -> None:
    with raw(server) as (connection, _):
        code, reason = closed_with(connection, sent, 20_000)
    assert code == 1008
    assert "a second" in reason


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"type": "ping"}, "more than 50 messages a second"),
        ({"type": "input", "text": "x" * MAX_CHARS}, "more than 2 MB a second"),
    ],
)
def test_messages_too_many_are_closed_upon(server: Running, message: dict[str, Any], reason: str) -> None:
    def send_and_receive(connection: ClientConnection) -> None:
        for _ in range(150):
            connection.send(json.dumps(message))
        while True:
            connection.recv(timeout=5)

    with connected(server) as connection:
        with pytest.raises(ConnectionClosed) as closed:
            send_and_receive(connection)
        assert closed.value.rcvd
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, reason)


def test_others_are_answered_meanwhile(server: Running) -> None:
    def flood() -> None:
        with raw(server) as (connection, _):
            closed_with(connection, frame(PING, b"") * 40_000, 10)

    floods = [threading.Thread(target=flood) for _ in range(8)]
    for thread in floods:
        thread.start()
    with connected(server) as connection:
        for number in range(10):
            started = time.monotonic()
            assert ask(connection, text=f"{number}")["input"] == f"{number}"
            assert time.monotonic() - started < 2
    for thread in floods:
        thread.join(10)


@pytest.mark.parametrize("nested", ["[" * 150, '{"a":' * 5000, "[" * 90_000])
def test_nested_json_is_an_error_and_the_connection_stays(server: Running, nested: str) -> None:
    with connected(server) as connection:
        connection.send(f'{{"type": "input", "text": {nested}')
        told = json.loads(connection.recv(timeout=5))
        assert (told["type"], "nested" in told["message"]) == ("error", True)
        assert ask(connection, text="a")["type"] == "prediction"


def test_doubled_slashes_and_bad_ids_are_put_right(server: Running) -> None:
    url = f"ws://127.0.0.1:{server.port}//ws//somebody"
    with connect(url, additional_headers={"X-Request-ID": "two words"}) as connection:
        assert ask(connection, text="a")["type"] == "prediction"
