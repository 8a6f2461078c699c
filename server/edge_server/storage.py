"""What survives a crash: the event log (SQLAlchemy Core, SQLite) and blobs named by their sha256 (a folder).

A call returns once its bytes are on disk. Nothing here knows what an event means.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from edge_sdk import files
from edge_sdk.errors import DataError

_METADATA = sa.MetaData()
_EVENTS = sa.Table(
    "events",
    _METADATA,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class EventLog:
    """Append-only; one process writes."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._engine = sa.create_engine(
            f"sqlite:///{path}", poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False}
        )
        sa.event.listen(self._engine, "connect", _durable)
        try:
            _METADATA.create_all(self._engine)
        except sa.exc.DatabaseError as error:
            raise DataError(f"{path} cannot be used ({error.orig}); move it away to start afresh") from error

    def append(self, body: bytes) -> None:
        """Returns once `body` is on disk."""
        with self._engine.begin() as connection:
            connection.execute(_EVENTS.insert().values(body=body))

    def read(self) -> Iterator[bytes]:
        """All events, oldest first."""
        with self._engine.connect() as connection:
            for row in connection.execute(sa.select(_EVENTS.c.body).order_by(_EVENTS.c.seq)):
                yield bytes(row.body)

    def close(self) -> None:
        self._engine.dispose()


def _durable(connection: Any, _: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


class Blobs:
    """Files named by their content; writing one twice is harmless."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("incoming-*"):  # what a killed process was writing
            left.unlink()

    def incoming(self) -> Path:
        """A fresh empty file to stream a body into; hand it to `keep` or unlink it."""
        handle, name = tempfile.mkstemp(prefix="incoming-", dir=self._folder)
        os.close(handle)
        return Path(name)

    def keep(self, incoming: Path, sha256: str) -> None:
        """Makes a streamed file the blob `sha256`; returns once it is on disk."""
        with incoming.open("rb") as file:
            os.fsync(file.fileno())
        incoming.replace(self._folder / sha256)
        files.sync_folder(self._folder)

    def take(self, path: Path) -> str:
        """Makes a file from `incoming`, filled by somebody else, a blob, and returns its sha256."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.keep(path, sha256)
        return sha256

    def put(self, body: bytes) -> str:
        """Keeps bytes and returns their sha256."""
        sha256 = hashlib.sha256(body).hexdigest()
        path = self.incoming()
        path.write_bytes(body)
        self.keep(path, sha256)
        return sha256

    def adopt(self, path: Path, sha256: str) -> None:
        """Makes an existing file available as a blob without copying it."""
        target = self._folder / sha256
        if not target.exists():
            target.unlink(missing_ok=True)  # a link to where the file was when the server ran last
            target.symlink_to(path.resolve())

    def path(self, sha256: str) -> Path | None:
        """Where a blob lies; None where there is none of that name."""
        path = self._folder / sha256
        return path if _SHA256.fullmatch(sha256) and path.is_file() else None

    def file(self, sha256: str) -> Path:
        """Where a blob lies. Raises: DataError: it is missing."""
        if (path := self.path(sha256)) is None:
            raise DataError(f"blob {sha256[:12]} is missing; restore {self._folder} from a backup")
        return path

    def get(self, sha256: str) -> bytes:
        """Raises: DataError: the blob is missing or damaged."""
        path = self.path(sha256)
        body = path.read_bytes() if path else None
        if body is None or hashlib.sha256(body).hexdigest() != sha256:
            raise DataError(f"blob {sha256} is missing or damaged; restore {self._folder} from a backup")
        return body
