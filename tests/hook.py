"""A webhook server that records its deliveries."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "a secret of the tests"


@dataclass
class Delivery:
    event_id: str
    signature: str
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.body)
        return told


@dataclass
class Hook:
    url: str
    secret: str = SECRET
    calls: list[Delivery] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)
    """By job: number of events to refuse before accepting."""

    def of(self, job_id: str) -> list[Delivery]:
        return [call for call in self.calls if call.event["job_id"] == job_id]


@contextmanager
def hook_on(port: int) -> Iterator[Hook]:
    hook = Hook(f"http://127.0.0.1:{port}/hook")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            call = Delivery(self.headers["X-Dure-Event-ID"], self.headers["X-Dure-Signature"], body)
            hook.calls.append(call)
            left = hook.refuse.get(call.event["job_id"], 0)
            hook.refuse[call.event["job_id"]] = left - 1
            self.send_response(500 if left > 0 else 204)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hook
    finally:
        server.shutdown()
        server.server_close()
