"""Runs the real `dure` for tests, with its own port, state folder and config."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from serve.operate.environment import first_free

ROOT = Path(__file__).resolve().parent.parent
READY_S = 400.0


GIVEN: set[int] = set()
"""Ports that this process has chosen so far. A server may take a while until it listens on one."""


def free_port() -> int:
    """A free port outside the ranges that the system, Ray and Serve assign from."""
    ports = range(20_000 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 2, 30_000, 2)
    port = first_free([each for each in random.sample(ports, 1000) if each not in GIVEN], "127.0.0.1")
    GIVEN.add(port)
    return port


def ports_of_its_own() -> dict[str, str]:
    """Environment with Serve's further ports. Clusters that start at once would otherwise pick the same free ones."""
    names = ("HAPROXY_STATS_PORT", "HAPROXY_METRICS_PORT", "FALLBACK_PROXY_HTTP_PORT")
    return {f"RAY_SERVE_{name}": str(free_port()) for name in names}


def config_file(folder: Path, models: dict[str, Any], port: int, **args: Any) -> Path:
    """Write a config like configs/local.yaml with other models and settings."""
    document = yaml.safe_load((ROOT / "configs/local.yaml").read_text(encoding="utf-8"))
    document["http_options"]["port"] = port
    document["logging_config"]["logs_dir"] = str(folder / "logs")
    document["applications"][0]["args"] |= {"models": models, **args}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


def wait_until(condition: Callable[[], bool], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)


class Dure:
    """A `dure serve` in its own process group, with everything it has printed."""

    def __init__(self, config: Path, state: Path, port: int, **environment: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.state = state
        self.environment = {**os.environ, "DURE_STATE": str(state), **ports_of_its_own(), **environment}
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serve", "serve", "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=self.environment,
            start_new_session=True,
            encoding="utf-8",
        )
        self.output: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.output.append(line.rstrip())

    @property
    def said(self) -> str:
        return "\n".join(self.output)

    def wait_ready(self, seconds: float = READY_S) -> Dure:
        self.wait_for("Ready: ", seconds)
        return self

    def wait_for(self, text: str, seconds: float = READY_S) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.said:
            assert self.process.poll() is None, f"dure serve ended: {self.said}"
            assert time.monotonic() < deadline, f"no {text!r} after {seconds} s: {self.said}"
            time.sleep(0.1)

    def ended(self, seconds: float) -> int:
        """Wait until it ends by itself and return the exit code."""
        code = self.process.wait(seconds)
        self.reader.join(5)
        return code

    def processes(self) -> list[psutil.Process]:
        """All live processes that this Dure started, without itself."""
        return [process for process in psutil.process_iter() if str(self.state) in _mark(process)]

    def command(self, *words: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "serve", *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**self.environment, "DURE_URL": self.url},
            timeout=seconds,
            check=False,
            encoding="utf-8",
        )

    def kill(self) -> None:
        """End everything that a failed test may have left behind."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        for process in self.processes():
            process.kill()


def _mark(process: psutil.Process) -> str:
    try:
        return process.environ().get("DURE_OWNER", "") if process.status() != psutil.STATUS_ZOMBIE else ""
    except (psutil.Error, OSError):
        return ""
