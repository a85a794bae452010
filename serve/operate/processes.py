"""Finds and ends the processes that belong to a Dure on this machine: all of them, and no others.

Everything that `dure serve` starts inherits a mark in its environment: the process that started it and its state
folder. A process whose owner is dead was left behind by a kill -9.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from serve import paths
from serve.failures import MachineError

MARK = "DURE_OWNER"


@dataclass(frozen=True)
class Owner:
    """A `dure serve` process that started others. Its creation time tells it from a later process with the same pid."""

    pid: int
    created: float
    state: str

    @classmethod
    def me(cls) -> Owner:
        return cls(os.getpid(), psutil.Process().create_time(), str(paths.STATE))

    @classmethod
    def parse(cls, mark: str) -> Owner | None:
        pid, created, state = [*mark.split(":", 2), "", ""][:3]
        try:
            return cls(int(pid), float(created), state)
        except ValueError:
            return None

    def __str__(self) -> str:
        return f"{self.pid}:{self.created}:{self.state}"

    @property
    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.created) < 0.1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:  # it is gone, or its pid belongs to another user by now
            return False


def make_state() -> None:
    """Create the state folder if it is missing. Raises MachineError if it can't be used."""
    try:
        paths.STATE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=paths.STATE) as probe:
            probe.write(b"x")
    except OSError as error:
        reason = "it is a file" if paths.STATE.is_file() else error.strerror
        raise MachineError(
            f"{paths.STATE} can't be used for logs and sockets: {reason}; set DURE_STATE to another folder"
        ) from error


def marked() -> Iterator[tuple[psutil.Process, Owner]]:
    """Living processes started by a `dure serve` with this state folder, with their owners."""
    for process in psutil.process_iter():
        try:
            owner = Owner.parse(process.environ().get(MARK, ""))
            ours = owner and owner.state == str(paths.STATE) and process.pid not in (os.getpid(), owner.pid)
            if owner and ours and process.status() != psutil.STATUS_ZOMBIE:
                yield process, owner
        except (psutil.Error, OSError):
            continue


def end(owners: set[Owner], patience_s: float = 2.0) -> int:
    """End all processes that these owners started: SIGTERM, then SIGKILL after `patience_s`. Returns their number."""
    ended: set[int] = set()
    for kill in (False, True, True):
        ours = [process for process, owner in marked() if owner in owners]
        if not ours:
            break
        ended |= {process.pid for process in ours}
        for process in ours:
            with contextlib.suppress(psutil.Error):
                process.kill() if kill else process.terminate()
        psutil.wait_procs(ours, patience_s)
    return len(ended)


def end_orphans() -> int:
    """End the processes that a killed `dure serve` with this state folder left behind. Returns their number."""
    return end({owner for _, owner in marked() if not owner.alive})


def socket_folder() -> Path:
    """A new temporary folder for HAProxy's sockets, whose paths may have at most 107 characters.

    Folders of dead processes are removed.
    """
    for old in Path(tempfile.gettempdir()).glob("dure-*-*"):
        pid = re.match(r"dure-([0-9]{1,9})-", old.name)
        if pid and not psutil.pid_exists(int(pid[1])):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"dure-{os.getpid()}-"))


def stop_all(timeout_s: float = 15.0) -> int:
    """Stop every `dure serve` with this state folder in order, then end what is left. Returns how many there were."""
    owners = {owner for _, owner in marked()}
    living = {owner for owner in owners if owner.alive}
    for owner in living:
        with contextlib.suppress(psutil.Error):
            psutil.Process(owner.pid).terminate()
    deadline = time.monotonic() + timeout_s
    while any(owner.alive for owner in living) and time.monotonic() < deadline:
        time.sleep(0.1)
    for owner in living:
        with contextlib.suppress(psutil.Error):
            if owner.alive:
                psutil.Process(owner.pid).kill()
    end(owners)
    return len(owners)


def listener(port: int) -> str:
    """The process that listens on a TCP port, for a message: "pid 123 (haproxy)" if that is visible."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            listening = connection.status == psutil.CONN_LISTEN and getattr(connection.laddr, "port", None) == port
            if listening and connection.pid:
                return f"pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "another process"
