"""Images from other servers, against a real one on loopback, which counts as a private network."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from serve.config.services import FetchSettings
from serve.errors import DureError
from serve.images import remote
from tests.dure import free_port


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        kind, _, rest = self.path[1:].partition("/")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
        elif kind == "slow":
            time.sleep(3)
        elif kind == "missing":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 1000)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", free_port()), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def fetch(url: str, hosts: list[str], private: bool = True, max_bytes: int = 5000, timeout_s: float = 5) -> bytes:
    settings = FetchSettings(hosts=hosts, private_addresses=private, timeout_s=timeout_s)
    return asyncio.run(remote.fetch(url, settings, max_bytes, "url"))


def refusal(*arguments: Any, **more: Any) -> str:
    with pytest.raises(DureError) as caught:
        fetch(*arguments, **more)
    assert caught.value.param == "url"
    assert caught.value.status in (400, 413)
    return caught.value.message


def test_an_allowed_host_is_fetched_from_also_after_a_redirect(port: int) -> None:
    here = f"http://127.0.0.1:{port}"
    assert fetch(f"{here}/image", ["127.0.0.1"]) == b"x" * 1000
    assert fetch(f"{here}/image", [f"127.0.0.1:{port}"]) == b"x" * 1000
    assert fetch(f"{here}/to//image", ["127.0.0.1"]) == b"x" * 1000
    assert fetch(f"{here}/to/http://localhost:{port}/image", ["127.0.0.1", "localhost"]) == b"x" * 1000


def test_nothing_is_fetched_from_others(port: int) -> None:
    here = f"http://127.0.0.1:{port}"
    assert "fetching is off" in refusal(f"{here}/image", [])
    assert "not among" in refusal(f"{here}/image", ["127.0.0.1:1"])
    assert "not among" in refusal(f"{here}/to/http://localhost:{port}/image", ["127.0.0.1"])
    assert "neither" in refusal(f"{here}/to/file:///etc/passwd", ["127.0.0.1"])
    assert "redirects" in refusal(f"{here}/to//to//to//to//image", ["127.0.0.1"])


def test_what_is_too_large_too_slow_or_not_there_is_refused(port: int) -> None:
    here = f"http://127.0.0.1:{port}"
    assert "over" in refusal(f"{here}/image", ["127.0.0.1"], max_bytes=999)
    assert "within" in refusal(f"{here}/slow", ["127.0.0.1"], timeout_s=0.3)
    assert "404" in refusal(f"{here}/missing", ["127.0.0.1"])
    assert "did not give" in refusal("http://127.0.0.1:9/image", ["127.0.0.1"])
    assert "did not give" in refusal("http://no-such-host.invalid/image", ["no-such-host.invalid"])


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.9", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "::1", "::", "fe80::1%eth0", "fd00::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"],
)  # fmt: skip
def test_a_name_that_leads_into_a_private_network_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    async def resolved(*_: Any, **__: Any) -> list[Any]:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [(socket.AF_INET, 0, 0, "", ("93.184.215.14", 80)), (family, 0, 0, "", (address, 80))]

    async def scenario() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolved)
        settings = FetchSettings(hosts=["harmless.example.org"])
        with pytest.raises(DureError, match="private network"):
            await remote.fetch("http://harmless.example.org/image", settings, 100, "url")

    asyncio.run(scenario())


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::5db8:d70e"])
def test_public_addresses_are_public(address: str) -> None:
    assert remote._is_public(address)
