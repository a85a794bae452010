"""`dure serve` on one machine: starts the cluster process, waits, and leaves no process behind however it ends."""

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

from deployments.checkpoints.sources import ROOT
from serve import paths
from serve.config.base import SettingsError
from serve.config.file import ConfigFile
from serve.failures import one_line
from serve.operate import environment, preflight, processes
from serve.operate.start_events import StartEvent

LOG_STARTS_KEPT = 5
SHUTDOWN_S = 10.0
"""An orderly shutdown is cut short after this long, so that everything has ended within 15 s of the signal."""
HEALTHY_S = 30.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked `dure serve` to stop."""


class Supervisor:
    """Holds the cluster process, which holds the cluster."""

    def __init__(self) -> None:
        self.owner = processes.Owner.me()
        self.errors = paths.STATE / "runner.log"
        self.process: subprocess.Popen[str] | None = None
        self.sockets: Path | None = None

    def heed_signals(self) -> None:
        """From now on, the first signal to stop raises Stopped."""
        for number in SIGNALS:
            signal.signal(number, _stop)

    def start(self, config: ConfigFile) -> None:
        """Start the cluster. Raises SettingsError and MachineError."""
        self.config = config
        processes.end_orphans()
        preflight.check(config)
        processes.make_state()
        self.sockets = processes.socket_folder()
        log_folder = _log_folder(config)
        with self.errors.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "serve.operate.cluster_process",
                    str(config.path),
                    *([str(log_folder)] if log_folder else []),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=environment.local_environment(self.sockets, config.port)
                | os.environ
                | {processes.MARK: str(self.owner)},
                start_new_session=True,
                encoding="utf-8",
            )

    def events(self) -> Iterator[StartEvent]:
        """What the cluster process reports, until it ends."""
        assert self.process
        assert self.process.stdout
        for line in self.process.stdout:
            with contextlib.suppress(ValueError, TypeError):  # libraries may print other lines
                yield StartEvent(**json.loads(line))

    def wait_healthy(self) -> bool:
        """Whether GET /health says, within HEALTHY_S, that all models are up."""
        deadline = time.monotonic() + HEALTHY_S
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.config.url}/health", timeout=5, trust_env=False).status_code == 200:
                    return True
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        return False

    def wait(self) -> str:
        """Wait until the cluster process ends by itself, which it should not. Returns the reason."""
        assert self.process
        code = self.process.wait()
        return f"the cluster ended by itself (exit code {code}): {self._last_words()}"

    def _last_words(self) -> str:
        """The last line that the cluster process wrote to stderr."""
        lines = [
            line for line in self.errors.read_text(errors="replace", encoding="utf-8").splitlines() if line.strip()
        ]
        return one_line(lines[-1]) if lines else "it said nothing"

    def stop(self) -> None:
        """End everything that was started, in order while time allows."""
        _ignore_signals()
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(SHUTDOWN_S)
        processes.end({self.owner})
        if self.sockets is not None:
            shutil.rmtree(self.sockets, ignore_errors=True)


def _stop(number: int, frame: FrameType | None) -> None:
    _ignore_signals()  # a second signal would cut short the stop that the first began
    raise Stopped


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _log_folder(config: ConfigFile) -> Path | None:
    """A folder for this start below the configured one. Those of the last LOG_STARTS_KEPT starts are kept."""
    logs = (config.document.get("logging_config") or {}).get("logs_dir")
    if not logs:
        return None
    root = Path(ROOT / logs)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"logging_config.logs_dir: {root}: {error.strerror}") from error
    starts = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for old in starts[: max(0, len(starts) - LOG_STARTS_KEPT + 1)]:
        shutil.rmtree(old, ignore_errors=True)
    folder = root / f"{time.strftime('%Y-%m-%dT%H-%M-%S')}-{os.getpid()}"
    folder.mkdir()
    return folder
