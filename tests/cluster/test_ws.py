"""Typing over a WebSocket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.cluster.conftest import MAX_CONNECTIONS, ORIGIN
from tests.dure import Dure, wait_until


def address(dure: Dure, client: str = "test") -> str:
    return f"{dure.url.replace('http', 'ws')}/ws/{client}"


@pytest.fixture
def socket(dure: Dure) -> Iterator[ClientConnection]:
    with connect(address(dure)) as open_socket:
        yield open_socket


def send(socket: ClientConnection, **message: Any) -> None:
    socket.send(json.dumps(message))


def receive(socket: ClientConnection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(socket.recv(timeout=20))
    return message


def test_an_input_is_answered_as_predict_answers(socket: ClientConnection, client: httpx.Client) -> None:
    send(socket, type="input", text="오늘 날씨가")
    answer = receive(socket)
    assert answer["type"] == "prediction"
    assert answer["input"] == "오늘 날씨가"
    assert "id" not in answer
    assert answer["data"] == client.post("/predict", json={"text": "오늘 날씨가"}).json()["predictions"]
    send(socket, type="input", text="임대인은 ", id="second", top_k=2)
    answer = receive(socket)
    assert answer["id"] == "second"
    assert len(answer["data"]) == 2


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("{", "JSON"),
        ("[]", "an object"),
        ('{"type": "shout", "text": "a"}', "'input', 'ping'"),
        ('{"type": "input"}', "text"),
        ('{"type": "input", "text": 5}', "text"),
        ('{"type": "input", "text": "a", "top_k": 99}', "top_k"),
        ('{"type": "input", "text": "a", "model": "embedder"}', "task"),
        (json.dumps({"type": "input", "text": "a" * 120_001}), "120001"),
        (b"\x00\x01", "bytes"),
    ],
)
def test_a_bad_message_gets_an_error_and_the_connection_stays_open(
    socket: ClientConnection, message: str | bytes, expected: str
) -> None:
    socket.send(message)
    answer = receive(socket)
    assert answer["type"] == "error"
    assert expected in answer["message"]
    send(socket, type="input", text="계약을 ")
    assert receive(socket)["type"] == "prediction"


def test_only_the_newest_input_is_answered(socket: ClientConnection) -> None:
    texts = [f"임대차 계약이 끝난 뒤에 {number} 번째로 " for number in range(40)]
    for number, text in enumerate(texts):
        send(socket, type="input", text=text, id=number, top_k=50)
    ids = []
    while not ids or ids[-1] != len(texts) - 1:
        answer = receive(socket)
        assert answer["input"] == texts[answer["id"]]
        ids.append(answer["id"])
    assert ids == sorted(set(ids))
    assert len(ids) < len(texts)
    with pytest.raises(TimeoutError):
        socket.recv(timeout=0.5)


def test_pings_are_answered_while_the_model_is_busy(socket: ClientConnection) -> None:
    send(socket, type="input", text="임대차 계약이 끝난 뒤에 ", id=1, top_k=50)
    for _ in range(60):
        send(socket, type="ping")
    answers = [receive(socket) for _ in range(61)]
    assert answers.count({"type": "pong"}) == 60
    assert [answer["id"] for answer in answers if answer["type"] == "prediction"] == [1]


def test_a_client_that_sends_without_end_is_disconnected(socket: ClientConnection) -> None:
    def ping() -> None:
        for _ in range(5000):
            send(socket, type="ping")
        for _ in range(5000):
            receive(socket)

    with pytest.raises(ConnectionClosed) as closed:
        ping()
    assert closed.value.rcvd
    assert closed.value.rcvd.code == 1008


def test_large_numbers_come_back_or_are_refused(socket: ClientConnection) -> None:
    send(socket, type="input", text="계약을 ", id=2**64)
    assert "id" in receive(socket)["message"]
    send(socket, type="input", text="계약을 ", id=2**63 - 1)
    assert receive(socket)["id"] == 2**63 - 1


def test_one_connection_too_many_is_told_to_try_again_later(dure: Dure, client: httpx.Client) -> None:
    with ExitStack() as sockets:
        for number in range(MAX_CONNECTIONS):
            sockets.enter_context(connect(address(dure, f"client-{number}")))
        one_more = sockets.enter_context(connect(address(dure)))
        with pytest.raises(ConnectionClosed) as closed:
            one_more.recv(timeout=10)
        assert closed.value.rcvd
        assert closed.value.rcvd.code == 1013

    def admitted() -> bool:
        with connect(address(dure)) as socket:
            try:
                send(socket, type="ping")
                return receive(socket) == {"type": "pong"}
            except ConnectionClosed:
                return False

    wait_until(admitted)


def test_pages_of_other_origins_are_refused(dure: Dure) -> None:
    for origin in ("https://elsewhere.example.org", "http://[", "null"):
        with pytest.raises(InvalidStatus) as refused:
            connect(address(dure), additional_headers={"Origin": origin})
        assert refused.value.response.status_code == 403
    for origin in (ORIGIN, dure.url):
        with connect(address(dure), additional_headers={"Origin": origin}) as socket:
            send(socket, type="ping")
            assert receive(socket) == {"type": "pong"}
