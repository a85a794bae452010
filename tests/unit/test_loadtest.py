"""The load test against a server that always refuses at first, and then answers nonsense."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.dure import ROOT


class Stub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(200)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        ticket = self.headers["X-Dure-Ticket"]
        if ticket == "number 1":
            self._answer(200)
        else:
            self._answer(429, {"Retry-After": "1", "X-Dure-Ticket": "number 1"})

    def _answer(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": "2", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def stub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def load_test(url: str) -> subprocess.CompletedProcess[str]:
    """Two people who search, in a process of its own: Locust changes how sockets and threads work."""
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--only-summary"]
    command += ["--host", url, "--users", "2", "--run-time", "4s", "Searcher"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, encoding="utf-8")


def test_who_is_refused_comes_back_with_the_ticket_and_a_wrong_answer_is_a_failure(stub: str) -> None:
    run = load_test(stub)
    assert run.returncode == 1, run.stdout + run.stderr
    rows = [[cell.strip() for cell in line.split("|")] for line in run.stdout.splitlines() if line.startswith("| POST")]
    failed = sum(int(row[7]) for row in rows)
    refused = sum(int(row[8].split()[0]) for row in rows)
    assert 0 < failed <= refused <= failed + 2  # who is refused at the end does not come back
    assert sum(int(row[2]) for row in rows) == failed + refused
    assert {row[9] for row in rows} == {"1"}
    assert ": 200: {}" in run.stdout


def test_a_server_that_is_not_there_is_said_at_once() -> None:
    run = load_test("http://127.0.0.1:9")
    assert run.returncode == 1
    assert "make serve" in run.stderr


@pytest.mark.parametrize(
    ("told", "well"),
    [
        ('event: running\ndata: {}\n\nevent: result\ndata: {"results":[]}\n\n', True),
        ('event: queued\ndata: {}\n\nevent: error\ndata: {"status":429}\n\n', True),
        ('event: queued\ndata: {}\n\nevent: error\ndata: {"status":500}\n\n', False),
        ('event: running\ndata: {"status":429}\n\n', False),
        ("", False),
    ],
)
def test_a_followed_search_ends_with_its_result_or_a_refusal(told: str, well: bool) -> None:
    code = f"from loadtests.locustfile import ends_well; print(ends_well({told!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert run.stdout.split()[-1] == str(well)
