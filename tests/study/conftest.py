"""A real PostgreSQL server of the tests' own."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Server:
    """A server in a folder of its own."""

    programs: Path
    folder: Path
    port: int

    @property
    def url(self) -> str:
        return f"postgresql://capgap@127.0.0.1:{self.port}/postgres"

    def control(self, *words: str) -> None:
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -c fsync=off"
        command = [self.programs / "pg_ctl", "-D", self.folder / "data", "-l", self.folder / "log", "-w", "-o", options]
        self.run(*command, *words)

    def restart(self) -> None:
        """As after a power cut: connections end at once, nothing is written out."""
        self.control("-m", "immediate", "restart")

    def run(self, *command: str | Path) -> None:
        # PostgreSQL refuses to run as root.
        user = "postgres" if os.getuid() == 0 else None
        subprocess.run(command, check=True, user=user, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)


def programs() -> Path | None:
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    found = programs()
    if found is None:
        pytest.skip("needs PostgreSQL's server (Debian: apt install postgresql)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="capgap-postgresql-"))
    if os.getuid() == 0:
        os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)
    server = Server(found, folder, port)
    try:
        server.run(found / "initdb", "-D", folder / "data", "-U", "capgap", "-A", "trust")
        server.control("start")
        yield server
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            server.control("-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)
