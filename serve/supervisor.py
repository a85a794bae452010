"""`dure serve` on one machine: starts the runner, waits, and leaves no process when it ends, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import httpx

from deployments.sources import ROOT
from serve import environment, processes
from serve.config_file import ConfigFile
from serve.places import Booking, Gpu, place
from serve.plan import with_shares
from serve.strict import SettingsError

LOG_STARTS_KEPT = 5
SHUTDOWN_S = 10.0
"""After which an orderly shutdown is cut short, so that all is over within 15 s of the signal."""
HEALTHY_S = 30.0


class Stopped(BaseException):
    """A signal asked for the end."""


class Supervisor:
    """Holds the runner, which holds the cluster."""

    def __init__(self, config: ConfigFile) -> None:
        self.config = config
        self.owner = processes.Owner.me()
        self.errors = processes.STATE / "runner.log"
        self.runner: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the cluster. Raises SettingsError where the port is taken or the machine lacks what models ask for."""
        processes.end_orphans()
        _check_port(self.config)
        _check_gpus(self.config)
        processes.STATE.mkdir(parents=True, exist_ok=True)
        self.sockets = processes.socket_folder()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _stop)
        log_folder = _log_folder(self.config)
        with self.errors.open("w", encoding="utf-8") as errors:
            self.runner = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "serve.runner",
                    str(self.config.path),
                    *([str(log_folder)] if log_folder else []),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=environment.local_environment(self.sockets) | os.environ | {processes.MARK: str(self.owner)},
                start_new_session=True,
                encoding="utf-8",
            )

    def events(self) -> Iterator[dict[str, str]]:
        """What the runner tells, until it ends."""
        assert self.runner
        assert self.runner.stdout
        for line in self.runner.stdout:
            if line.startswith("{"):
                yield json.loads(line)

    def wait_healthy(self) -> bool:
        """Whether the endpoint answers for itself that all models are up."""
        deadline = time.monotonic() + HEALTHY_S
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.config.url}/health", timeout=5).status_code == 200:
                    return True
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        return False

    def wait(self) -> str:
        """Wait until the runner ends by itself, which it should not. Returns the reason."""
        assert self.runner
        code = self.runner.wait()
        return f"the cluster ended by itself (exit code {code}): {self.last_words()}"

    def last_words(self) -> str:
        """The end of what the runner wrote to stderr."""
        lines = [
            line for line in self.errors.read_text(errors="replace", encoding="utf-8").splitlines() if line.strip()
        ]
        return lines[-1] if lines else "it said nothing"

    def stop(self) -> None:
        """End all that was started, in good order while time allows."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if self.runner is not None and self.runner.poll() is None:
            self.runner.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.runner.wait(SHUTDOWN_S)
        processes.end({self.owner})
        if self.runner is not None:
            shutil.rmtree(self.sockets, ignore_errors=True)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _check_port(config: ConfigFile) -> None:
    if not environment.is_free(config.host, config.port):
        raise SettingsError(
            f"port {config.port} on {config.host} is taken by {processes.listener(config.port)}; stop it (`dure stop` "
            "if it is Dure's) or set http_options.port in the config"
        )


def _check_gpus(config: ConfigFile) -> None:
    """Every model's first replicas have to find their places, and one that sleeps needs a GPU to wake up on."""
    models = with_shares(config.settings).models
    first = [
        Booking(name, model.autoscaling.min_replicas, model.gpu_share)
        for name, model in models.items()
        if model.gpu_share
    ]
    if not first:
        return
    import torch

    count = torch.cuda.device_count()
    without_place = list(place(first, [Gpu(number) for number in range(count)]))
    if without_place or max(booking.gpus for booking in first) > count:
        asked = ", ".join(f"{booking.model} {booking.booked:g} x {booking.replicas}" for booking in first)
        raise SettingsError(f"the models ask for GPUs ({asked}); this machine has {count}, where they don't fit")


def _log_folder(config: ConfigFile) -> Path | None:
    """A folder for this start below the configured one; those of the last few starts are kept."""
    logs = (config.document.get("logging_config") or {}).get("logs_dir")
    if not logs:
        return None
    root = Path(ROOT / logs)
    root.mkdir(parents=True, exist_ok=True)
    starts = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for old in starts[: max(0, len(starts) - LOG_STARTS_KEPT + 1)]:
        shutil.rmtree(old, ignore_errors=True)
    folder = root / f"{time.strftime('%Y-%m-%dT%H-%M-%S')}-{os.getpid()}"
    folder.mkdir()
    return folder
