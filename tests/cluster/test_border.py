"""The border in the real cluster, where HAProxy, or Serve's own proxy, comes before the ingress."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.dure import Dure, wait_until


def raw(url: str, head: str, body: bytes = b"") -> bytes:
    """What comes back on a connection of its own, until it is closed."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(f"{head}\r\nHost: dure\r\nConnection: close\r\n\r\n".encode("latin-1") + body)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


def fallback(dure: Dure) -> str:
    """Serve's own proxy, which HAProxy turns to while no ingress answers."""
    return f"http://127.0.0.1:{dure.environment['RAY_SERVE_FALLBACK_PROXY_HTTP_PORT']}"


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/model/upload-stream?follow=true"])
def test_head_is_get_without_the_body(client: httpx.Client, path: str) -> None:
    head = client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"]


@pytest.mark.parametrize("through", ["haproxy", "serve's proxy"])
def test_requests_are_put_right_whichever_way_they_come(dure: Dure, through: str) -> None:
    url = dure.url if through == "haproxy" else fallback(dure)
    body = b'{"input": "a", "encoding_format": null}'
    head = [
        "POST //v1/embeddings HTTP/1.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "X-Request-ID: \xff",
        "x-request-timeout-seconds: 1e9",
        "x-session-id: \xff",
    ]
    answer = raw(url, "\r\n".join(head), body)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.lower().count(b"\r\nx-request-id: ") == 1
    nested = raw(url, "\r\n".join([*head[:2], "Content-Length: 9000"]), b"[" * 9000)
    assert nested.startswith(b"HTTP/1.1 400 ")
    assert b"nested" in nested


def test_a_call_that_nobody_waits_for_ends_whatever_its_headers_say(dure: Dure, client: httpx.Client) -> None:
    def under_way() -> int:
        models = client.get("/v1/queues").raise_for_status().json()["models"]
        return sum(model["running"] + model["waiting"] for model in models if model["name"] == "shout")

    body = json.dumps({"items": [{"say": "a", "wait": 8}]}).encode()
    head = f"POST /v1/models/shout/run HTTP/1.1\r\nHost: dure\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\nx-request-disconnect-disabled: ?1\r\n\r\n"
    address = urlsplit(dure.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: under_way() == 1, 5)
    wait_until(lambda: under_way() == 0, 5)


def test_large_and_compressed_messages_are_refused(dure: Dure) -> None:
    def send(message: str) -> Any:
        with connect(f"ws{dure.url.removeprefix('http')}/ws/large", compression="deflate") as connection:
            assert not connection.protocol.extensions
            connection.send(message)
            return json.loads(connection.recv(timeout=10))

    assert send(json.dumps({"type": "input", "text": "가" * 100_000}))["type"] == "prediction"
    with pytest.raises(ConnectionClosed) as closed:
        send("x" * 15_000_000)
    assert closed.value.rcvd
    assert closed.value.rcvd.code == 1009
