"""The process that holds the cluster of `dure serve`, in a session of its own.

Signals to the terminal's process group do not reach it, so it can always stop in order: on SIGTERM, or when its
standard input ends because its parent has died. It reports what happens as JSON lines on standard output.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path

from serve.config.base import SettingsError
from serve.config.file import ConfigFile, read_config
from serve.config.settings import Settings
from serve.failures import CONFIG, MACHINE, one_line
from serve.operate.start_events import StartEvent


def main() -> int:
    """Hold a cluster until a signal comes. Returns the exit code for `dure serve`."""
    if len(sys.argv) not in (2, 3):
        print("usage: python -m serve.operate.cluster_process CONFIG [LOG_FOLDER]", file=sys.stderr)
        return CONFIG
    try:
        config = read_config(Path(sys.argv[1]))
        check_code(config.settings)
    except SettingsError as error:
        print(error, file=sys.stderr)
        _emit(StartEvent("failed", str(error), code=CONFIG))
        return CONFIG
    return _hold(config, Path(sys.argv[2]) if len(sys.argv) > 2 else None)


def check_code(settings: Settings) -> None:
    """Check that this machine has the code that the settings name. Replicas import it the same way as this process.

    Raises SettingsError.
    """
    for name, model in settings.models.items():
        policy = model.autoscaling.policy
        for setting, path in (("task", model.task), ("autoscaling.policy", policy)):
            package = (path or "").partition(":")[0].partition(".")[0]
            if path and ":" in path and not _is_there(package):
                raise SettingsError(f"model {name}: {setting} {path!r}: there is no module {package!r}")
        if policy:
            module, _, function = policy.partition(":")
            try:
                getattr(importlib.import_module(module), function)
            except Exception as error:  # a user's own code may raise anything
                raise SettingsError(f"model {name}: autoscaling.policy {policy!r}: {one_line(str(error))}") from error


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _hold(config: ConfigFile, log_folder: Path | None) -> int:
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: over.set())
    threading.Thread(target=_end_with_parent, args=(over,), daemon=True).start()

    _emit(StartEvent("stage", "Starting Ray"))
    from serve.operate import cluster

    try:
        cluster.start()
        for number in (signal.SIGINT, signal.SIGTERM):  # ray.init has installed its own handlers
            signal.signal(number, lambda *_: over.set())
        if not over.is_set():
            _emit(StartEvent("stage", "Starting Serve"))
            cluster.deploy(config, log_folder)
            for event in cluster.follow(config, over.is_set):
                _emit(event)
        over.wait()
        return 0
    except Exception as error:
        traceback.print_exc()  # goes to the log; a person sees one line
        _emit(StartEvent("failed", f"the cluster failed: {one_line(f'{type(error).__name__}: {error}')}"))
        return MACHINE
    finally:
        cluster.stop()


def _end_with_parent(over: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    over.set()


def _emit(event: StartEvent) -> None:
    try:
        sys.stdout.write(json.dumps(asdict(event)) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


if __name__ == "__main__":
    sys.exit(main())
