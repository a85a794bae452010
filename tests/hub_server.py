"""A hub server on loopback: the HTTP API that the client needs to fetch files, with failures on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.dure import free_port

LARGE = (".safetensors", ".bin", ".onnx", ".h5", ".msgpack", ".ot")
"""Endings of files that the hub redirects to another host."""


class Hub:
    """Repositories by name. Each has the files of one commit, reachable as `main` or by its hash."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.files: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []
        """Method and path of each request."""
        self.sent: dict[str, int] = {}
        """Bytes sent of each file, over all requests."""
        self.breaks: dict[str, int] = {}
        """Files whose transfer breaks off once, after this many bytes."""
        self.stalls: dict[str, int] = {}
        """Files whose transfer stalls after this many bytes."""
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, source: str, files: dict[str, bytes]) -> str:
        """Add a repository with these files and return its commit."""
        self.files[source] = files
        return self.commit(source)

    def commit(self, source: str) -> str:
        return hashlib.sha1(source.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def _route(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.hub.asked.append(f"{self.command} {self.path}")
        if parts[:2] == ["api", "models"]:
            source, kind, revision, rest = "/".join(parts[2:4]), parts[4], parts[5], ""
        elif parts[0] == "large":
            source, kind, revision, rest = "/".join(parts[1:3]), "large", "main", "/".join(parts[3:])
        else:
            source, kind, revision, rest = "/".join(parts[:2]), parts[2], parts[3], "/".join(parts[4:])
        files = self.hub.files.get(source)
        if files is None:
            return self._refuse(404, "RepoNotFound")
        if source in self.hub.gated:
            return self._refuse(403, "GatedRepo")
        if revision not in ("main", self.hub.commit(source)):
            return self._refuse(404, "RevisionNotFound")
        if kind == "revision":
            return self._answer({"id": source, "sha": self.hub.commit(source), "siblings": self._siblings(files)})
        if kind == "tree":
            return self._answer([self._entry(name, data) for name, data in files.items()])
        if rest not in files:
            return self._refuse(404, "EntryNotFound")
        return self._file(source, rest, files[rest], elsewhere=kind == "large")

    def _siblings(self, files: dict[str, bytes]) -> list[dict[str, Any]]:
        """The list of files. Like the hub's, it has sizes only on request."""
        sizes = "blobs=" in self.path.lower()
        return [{"rfilename": name} | ({"size": len(data)} if sizes else {}) for name, data in files.items()]

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _tag(data)[:40]}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": _tag(data), "size": len(data), "pointerSize": 134}
        return entry

    def _file(self, source: str, name: str, data: bytes, elsewhere: bool) -> None:
        if name.endswith(LARGE) and not elsewhere:
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.hub.port}/large/{source}/{name}")
            self.send_header("X-Linked-ETag", f'"{_tag(data)}"')
            self.send_header("X-Linked-Size", str(len(data)))
            self._end(source, 0)
            return
        wanted = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(wanted[0]), min(int(wanted[2] or len(data)) + 1, len(data))
        part = start > 0 or end < len(data)
        self.send_response(206 if part else 200)
        if part:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("ETag", f'"{_tag(data)}"')
        self._end(source, end - start)
        if self.command == "GET":
            self._send(name, data[start:end])

    def _send(self, name: str, data: bytes) -> None:
        stop = min(self.hub.breaks.pop(name, len(data)), self.hub.stalls.get(name, len(data)))
        self.wfile.write(data[:stop])
        self.wfile.flush()
        self.hub.sent[name] = self.hub.sent.get(name, 0) + stop
        if stop < len(data):
            if name in self.hub.stalls:
                self.hub.released.wait(60)
            self.close_connection = True

    def _end(self, source: str, length: int) -> None:
        self.send_header("X-Repo-Commit", self.hub.commit(source))
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _answer(self, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub(free_port())
    server = ThreadingHTTPServer(("127.0.0.1", hub.port), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()


def environment(hub: Hub, cache: Path) -> dict[str, str]:
    """Environment of a process that uses this hub and this cache."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
