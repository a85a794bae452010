"""Which processes on this machine belong to a Dure, and how they are ended: none is left, and none but ours is touched.

Everything that `dure serve` starts inherits a mark in its environment: the process that started it and the folder
where it keeps its state. A mark whose owner is dead is what a kill -9 left.
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
    """The `dure serve` process that started others; the time tells it from a later process of the same pid."""

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
        except psutil.Error:  # it is gone, or somebody else's by now
            return False


def make_state() -> None:
    """Make the state folder where there is none. Raises MachineError where there can't be one."""
    try:
        paths.STATE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=paths.STATE) as probe:
            probe.write(b"x")
    except OSError as error:
        reason = "it is a file" if paths.STATE.is_file() else error.strerror
        raise MachineError(
            f"{paths.STATE} can't be used for logs and sockets: {reason}; DURE_STATE names another folder"
        ) from error


def marked() -> Iterator[tuple[psutil.Process, Owner]]:
    """Living processes that a `dure serve` with this state folder started, with their owners."""
    for process in psutil.process_iter():
        try:
            owner = Owner.parse(process.environ().get(MARK, ""))
            ours = owner and owner.state == str(paths.STATE) and process.pid not in (os.getpid(), owner.pid)
            if owner and ours and process.status() != psutil.STATUS_ZOMBIE:
                yield process, owner
        except (psutil.Error, OSError):
            continue


def end(owners: set[Owner], patience_s: float = 2.0) -> int:
    """End all that these owners started: SIGTERM, and SIGKILL after `patience_s`. Returns how many there were."""
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
    """End what a killed `dure serve` with this state folder left. Returns how many processes there were."""
    return end({owner for _, owner in marked() if not owner.alive})


def socket_folder() -> Path:
    """A new folder for HAProxy's sockets, whose paths may have 107 characters only; those of the dead are removed."""
    for old in Path(tempfile.gettempdir()).glob("dure-*-*"):
        pid = re.match(r"dure-([0-9]{1,9})-", old.name)
        if pid and not psutil.pid_exists(int(pid[1])):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"dure-{os.getpid()}-"))


def stop_all(timeout_s: float = 15.0) -> int:
    """Stop every `dure serve` here in good order, then end what is left. Returns how many there were."""
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
    """Who listens on a TCP port, for a message: "pid 123 (haproxy)" where that can be seen."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            listening = connection.status == psutil.CONN_LISTEN and getattr(connection.laddr, "port", None) == port
            if listening and connection.pid:
                return f"pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "another process"
