"""Runs a function in a process of its own, so that its libraries and memory are freed when it returns."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deployments.load_progress import LoadEvent, LoadProgress
from deployments.spec import first_line

INLINE = False
"""Run functions in this process instead: it was started for one, or need not be kept small."""
LONGEST_S = 1800.0
"""Time after which the process is killed."""


class Died(Exception):
    """The process ended without an answer, for example because memory ran out."""


@dataclass(frozen=True)
class _Failed:
    error: Exception


@dataclass(frozen=True)
class _Returned:
    result: Any


def run(function: str, *arguments: Any, progress: LoadProgress) -> Any:
    """Call `MODULE:FUNCTION` with the arguments and a LoadProgress that relays to `progress`; return its result.

    Raises what the function raises, and Died.
    """
    if INLINE:
        return _function(function)(*arguments, progress)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-m", __spec__.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    ends = threading.Timer(LONGEST_S, process.kill)
    ends.daemon = True
    ends.start()
    try:
        assert process.stdin
        assert process.stdout
        pickle.dump((function, arguments), process.stdin)
        process.stdin.flush()  # left open: when it closes, the process knows that nobody waits
        while True:
            message = pickle.load(process.stdout)
            if isinstance(message, LoadEvent):
                progress.relay(message)
            elif isinstance(message, _Failed):
                raise message.error
            else:
                return message.result
    except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
        process.kill()
        raise Died(f"the helper process ended with code {process.wait()}") from error
    finally:
        ends.cancel()
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


def _main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever libraries print must not mix with answers
    lock = threading.Lock()

    def send(what: Any) -> None:
        message = pickle.dumps(what)
        with lock:
            answers.write(message)
            answers.flush()

    function, arguments = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import deployments.aside

        deployments.aside.INLINE = True
        send(deployments.aside._Returned(_function(function)(*arguments, LoadProgress(send))))
    except Exception as error:
        try:
            send(deployments.aside._Failed(error))
        except (pickle.PicklingError, AttributeError, TypeError):
            send(deployments.aside._Failed(RuntimeError(first_line(error))))


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    _main()
