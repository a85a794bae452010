"""Starts and stops the servers to compare, each on loopback, with a port and an environment of its own."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from serve.operate.environment import first_free
from serve.operate.processes import MARK, Owner

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / ".dure/bench"
PEERS = Path(__file__).with_name("peers")
INSTALL_S, READY_S, STOP_S = 1800, 180, 25

PATHS = {"embedding": "/v1/embeddings", "rerank": "/v1/rerank"}


class NotStarted(Exception):
    """A server ended early or never became healthy; the message has the end of its log."""


@dataclass(frozen=True, eq=False)
class Server:
    """How to start one server with one choice of settings."""

    name: str
    settings: str
    command: list[str]
    port: int
    path: str
    environment: dict[str, str] = field(default_factory=dict)
    clear_up: list[str] = field(default_factory=list)
    """A command that ends what the server may have left behind."""
    details: dict[str, str] = field(default_factory=dict)
    """All settings, if `settings` is only a short form of them."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    @property
    def log(self) -> Path:
        return BENCH / "logs" / f"{self.name}-{self.port}.log"

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Start the server and yield its process once it is healthy; always stops it. Raises NotStarted."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        environment |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", **self.environment}
        with self.log.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                self.command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
            )
        try:
            self._wait_healthy(process)
            yield process
        finally:
            _end(process)
            if self.clear_up:
                subprocess.run(self.clear_up, cwd=ROOT, env=environment, timeout=60, check=False, capture_output=True)

    def _wait_healthy(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise NotStarted(f"{self.name} ended while starting:\n{self._last_words()}")
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise NotStarted(f"{self.name} was not healthy after {READY_S} s:\n{self._last_words()}")

    def _last_words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace", encoding="utf-8").splitlines()[-20:])


@contextmanager
def alone(server: Server, processes: dict[Server, subprocess.Popen[bytes]]) -> Iterator[None]:
    """Stop the other peers while this server is measured: an idle LitServe may take a whole core.

    Dure keeps running, because its processes watch each other's health.
    """
    others = [process for other, process in processes.items() if other is not server and other.name != "Dure"]
    for process in others:
        os.killpg(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in others:
            os.killpg(process.pid, signal.SIGCONT)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server's process group: SIGTERM, then SIGKILL for what is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            continue


def dure(task: str, source: str | None = None) -> Server:
    """All that `make serve` starts; if `source` is given, it is the checkpoint of the task's model."""
    document = shipped()
    models: dict[str, Any] = document["applications"][0]["args"]["models"]
    if source:
        next(model for model in models.values() if model["task"] == task)["source"] = source
    return dure_from(document, task, PATHS[task], "configs/local.yaml")


def dure_with(
    name: str,
    models: dict[str, Any],
    ingress: dict[str, Any],
    path: str,
    setting: str = "",
    details: dict[str, str] | None = None,
    more: dict[str, Any] | None = None,
) -> Server:
    """Dure with these models and `more` settings. `name` names its config file."""
    document = shipped()
    document["applications"][0]["args"] |= {"models": models, "ingress": ingress, **(more or {})}
    return dure_from(document, name, path, setting, details)


def shipped() -> dict[str, Any]:
    """The config that `make serve` starts."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "configs/local.yaml").read_text(encoding="utf-8"))
    return document


def dure_from(
    document: dict[str, Any], name: str, path: str, setting: str = "", details: dict[str, str] | None = None
) -> Server:
    """Dure with this config, but on a port and with logs of its own."""
    port = free_port()
    document["http_options"]["port"] = port
    document["logging_config"]["logs_dir"] = str(BENCH / "dure/logs")
    config = BENCH / f"dure/{name}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "serve"]
    return Server(
        "Dure",
        setting,
        [*command, "serve", "--config", str(config)],
        port,
        path,
        {"DURE_STATE": str(BENCH / "dure")},
        [*command, "stop"],
        details or {},
    )


def infinity(task: str, model: Path, precision: str, batch: int) -> Server:
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    port = free_port()
    command = [str(_python("infinity")), "-m", "infinity_emb.cli", "v2", "--model-id", str(model)]
    command += [
        "--engine",
        "torch",
        "--no-bettertransformer",
        "--device",
        "cpu",
        "--dtype",
        dtype,
        "--batch-size",
        str(batch),
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    path = {"embedding": "/embeddings", "rerank": "/rerank"}[task]
    return Server("Infinity", f"{precision}, batch {batch}", command, port, path)


def litserve(task: str, model: Path, precision: str, batch: int, timeout_ms: int) -> Server:
    more = ["--max-batch-size", str(batch), "--batch-timeout", str(timeout_ms / 1000)]
    setting = f"{precision}, {batch} requests per batch, timeout {timeout_ms} ms"
    return _own("LitServe", "litserve", "lit_server.py", task, model, precision, setting, more)


def fastapi(task: str, model: Path, precision: str) -> Server:
    return _own("FastAPI", "fastapi", "plain_server.py", task, model, precision, precision, [])


def _own(
    name: str, peer: str, script: str, task: str, model: Path, precision: str, setting: str, more: list[str]
) -> Server:
    """A server whose source is in `peers`."""
    port = free_port()
    command = [str(_python(peer)), str(PEERS / script), "--task", task, "--model", str(model)]
    return Server(name, setting, [*command, "--precision", precision, "--port", str(port), *more], port, PATHS[task])


def processes(root: int) -> list[psutil.Process]:
    """A Dure's process and all that it has started, known by the mark in their environment."""
    found = [psutil.Process(root)]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            owner = Owner.parse(process.environ().get(MARK, ""))
            if owner and owner.pid == root and process.pid != root:
                found.append(process)
    return found


def served_as(dure: Server, task: str) -> tuple[str, str]:
    """The precision and runtime that Dure chose for the first model of a task."""
    url = f"http://127.0.0.1:{dure.port}/v1/models"
    models = httpx.get(url, timeout=30).raise_for_status().json()["data"]
    name = next(model["id"] for model in models if model["task"] == task)
    model = httpx.get(f"{url}/{name}", timeout=30).raise_for_status().json()
    return model["precision"], model["runtime"]


def versions(server: Server) -> dict[str, str]:
    """The versions of the main packages in the server's environment."""
    packages = {"Dure": "ray", "Infinity": "infinity-emb", "LitServe": "litserve", "FastAPI": "fastapi"}
    wanted = [packages[server.name], "torch", "transformers", "sentence-transformers"]
    code = f"from importlib.metadata import version\nprint(*[version(name) for name in {wanted}])"
    python = str(Path(server.command[0]).with_name("python"))
    said = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, timeout=60, check=True, encoding="utf-8"
    )
    return dict(zip(wanted, said.stdout.split(), strict=True))


def _python(peer: str) -> Path:
    """The interpreter of a peer's virtual environment, created on first use and again when its versions change."""
    folder = BENCH / "environments" / peer
    wanted = (PEERS / f"{peer}.txt").read_text(encoding="utf-8")
    installed = folder / "installed.txt"
    python = folder / "bin/python"
    if not installed.exists() or installed.read_text(encoding="utf-8") != wanted:
        print(f"Installing {peer} into {folder.relative_to(ROOT)}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], timeout=INSTALL_S, check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--requirement", str(PEERS / f"{peer}.txt")], timeout=INSTALL_S, check=True)
        installed.write_text(wanted, encoding="utf-8")
    return python


def free_port() -> int:
    """A free port in a range from which neither the system nor Ray nor Serve gives ports to others."""
    return first_free(random.sample(range(20_000, 30_000), 100), "127.0.0.1")
