"""A real PostgreSQL server on loopback, for tests and benchmarks. It can be stopped and started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER = "postgres"
START_S = 30.0


def binaries() -> Path | None:
    """Folder of the newest version's programs as Debian installs them, or of those on the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("postgres")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


class Postgres:
    """A server with its data in `folder`. `database` makes an empty database and returns its URL."""

    def __init__(self, folder: Path, port: int) -> None:
        found = binaries()
        assert found, "PostgreSQL is not installed: apt-get install postgresql"
        self.binaries, self.folder, self.port = found, folder, port
        self.process: subprocess.Popen[bytes] | None = None
        self._count = 0
        if os.getuid() == 0:
            shutil.chown(folder, USER)
        options = ["--auth=trust", f"--username={USER}", "--encoding=UTF8", "--no-locale", "--no-sync"]
        self._do("initdb", "--pgdata", str(folder / "data"), *options)

    def start(self) -> None:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.folder),
            "fsync": "off",
        }
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        command = self._as_user(str(self.binaries / "postgres"), "-D", str(self.folder / "data"), *settings)
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
        deadline = time.monotonic() + START_S
        ready = self._as_user(str(self.binaries / "pg_isready"), "-h", "127.0.0.1", "-p", str(self.port), "-q")
        while subprocess.run(ready, check=False, cwd="/").returncode:
            assert time.monotonic() < deadline, "PostgreSQL does not start"
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop at once and cut all connections, as in an orderly shutdown of its machine."""
        if self.process:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(START_S)
            self.process = None

    def database(self) -> str:
        self._count += 1
        name = f"dure_{self._count}"
        self._do("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", USER, name)
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{name}"

    def _do(self, program: str, *arguments: str) -> None:
        command = self._as_user(str(self.binaries / program), *arguments)
        subprocess.run(command, check=True, capture_output=True, timeout=60, cwd="/")

    def _as_user(self, *command: str) -> list[str]:
        """The command, run as `postgres` if this process is root, because PostgreSQL refuses to run as root."""
        if os.getuid() != 0:
            return list(command)
        return ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", *command]


@contextmanager
def postgres(port: int) -> Iterator[Postgres]:
    """A running server in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        server = Postgres(Path(folder), port)
        server.start()
        try:
            yield server
        finally:
            server.stop()
