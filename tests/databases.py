"""A PostgreSQL of the tests' own: started on 127.0.0.1 as nobody in particular, gone when they are."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

WRITTEN_ANYHOW = ["-c", "fsync=off", "-c", "full_page_writes=off"]  # no test cuts the power


def binaries() -> Path | None:
    """Where PostgreSQL's programs are; Debian does not put them on the path."""
    if found := sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


@dataclass(frozen=True)
class Postgres:
    """A running server that believes everybody on this machine."""

    port: int
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def create(self) -> str:
        """The URL of what a server takes for a fresh database: a schema, made in no time."""
        name = f"test_{next(self._numbers)}"
        with self.ask() as db:
            db.execute(f"CREATE SCHEMA {name}")
        return f"{self.url()}?options=-csearch_path%3D{name}"

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://edge@127.0.0.1:{self.port}/{database}"

    @contextlib.contextmanager
    def ask(self) -> Iterator[psycopg.Connection]:
        """A connection of the administrator's."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            yield connection

    def hang_up(self) -> None:
        """Ends everybody's connection, and returns once they are gone."""
        with self.ask() as db:
            clients = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
            db.execute(f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE {clients}")  # noqa: S608


@contextlib.contextmanager
def postgres(programs: Path) -> Iterator[Postgres]:
    """Starts one, and stops it; PostgreSQL refuses to run as root, so it runs as nobody then."""
    user = "nobody" if os.geteuid() == 0 else None

    def run(program: str, *arguments: str) -> None:
        command = [str(programs / program), *arguments]
        group = None if user is None else "nogroup"
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=user, group=group, cwd="/", timeout=60)

    with tempfile.TemporaryDirectory(prefix="tandem-postgres-", ignore_cleanup_errors=True) as folder:
        if user is not None:
            shutil.chown(folder, user)
        data = f"{folder}/data"
        run("initdb", "-D", data, "-U", "edge", "-A", "trust", "-E", "UTF8", "--no-sync")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        settings = ["-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", *WRITTEN_ANYHOW]
        run("pg_ctl", "-D", data, "-w", "-l", f"{folder}/log", "-o", " ".join(settings), "start")
        try:
            yield Postgres(port)
        finally:
            run("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
