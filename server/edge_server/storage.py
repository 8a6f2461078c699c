"""What survives a crash: events and snapshots (SQLAlchemy Core: SQLite or PostgreSQL), and blobs named by their sha256.

A call returns once its bytes are on disk. Nothing here knows what an event means.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sqlite3
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from edge_sdk import files
from edge_sdk.errors import DataError, SettingsError
from edge_server.failpoints import Reached, nothing

_METADATA = sa.MetaData()
_RUN = sa.Table("run", _METADATA, sa.Column("id", sa.String, primary_key=True))
_EVENTS = sa.Table(
    "events",
    _METADATA,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
)
_SNAPSHOTS = sa.Table(
    "snapshots",
    _METADATA,
    sa.Column("after", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("program", sa.String, nullable=False),
    sa.Column("sha256", sa.String, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOCK = 0x7AE  # of one server on one schema, the first of the two numbers PostgreSQL wants
LOCK_SECONDS = 5  # a server that was just killed may hold it so long
PAGE = 1000  # events in memory while reading


def sqlite(path: Path) -> sa.URL:
    """The database in this file."""
    return sa.URL.create("sqlite", database=str(path))


def postgresql(text: str) -> sa.URL:
    """Raises: SettingsError: this is no URL of a PostgreSQL database."""
    try:
        url = sa.make_url(text)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise SettingsError("--state is a URL, as postgresql://user@host/database") from error  # what it is may hold a password
    if url.drivername not in ("postgresql", "postgresql+psycopg"):
        raise SettingsError(f"--state is postgresql://..., not {url.drivername}; without it there is a SQLite file in --data")
    return url.set(drivername="postgresql+psycopg")


def bodies(path: Path) -> Iterator[bytes]:
    """All events of a SQLite file that a server may be writing to, oldest first. Raises: DataError: they cannot be read."""
    where = f"{path.absolute().as_uri()}?mode=ro"
    engine = sa.create_engine("sqlite://", creator=lambda: sqlite3.connect(where, uri=True), poolclass=sa.NullPool)
    try:
        with engine.connect() as db:
            yield from (bytes(row.body) for row in db.execute(sa.select(_EVENTS).order_by(_EVENTS.c.seq)))
    except sa.exc.DBAPIError as error:
        raise DataError(f"{path} cannot be read: {error.orig}") from error


class EventLog:
    """Append-only, one process writes: on PostgreSQL the connection that writes holds a lock; a SQLite file's folder is held.

    Events are numbered 1, 2, ... here, not by the database, so that no number is given twice whoever else may write. A
    connection that is lost is not made again: nobody knows whether the last event arrived, and the lock may be another's.

    Args:
        reached: told where it is; for tests that kill it there.

    Attributes:
        run: the id of the run, made with the database.
        newest: the number of the newest event; 0 before the first.
        lost: whether the connection is.

    Raises:
        SettingsError: another server writes to this database.
        DataError: there is no such database, or it is damaged.
    """

    def __init__(self, url: sa.URL, reached: Reached = nothing) -> None:
        self._reached, self._name = reached, url.render_as_string()
        self._one = threading.Lock()
        self.lost = False
        prepare = _only_writer
        if url.get_backend_name() == "sqlite":
            Path(url.database or "").parent.mkdir(parents=True, exist_ok=True)
            prepare = _durable
        connect_args = {"check_same_thread": False} if prepare is _durable else {}
        self._engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args=connect_args)
        sa.event.listen(self._engine, "connect", prepare)
        try:
            self._connection = self._engine.connect()
        except sa.exc.DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) == "55P03":  # lock_not_available
                raise SettingsError(f"another edge-server already uses {self._name}; stop it, or choose another") from error
            raise DataError(f"{self._name} cannot be used: {error.orig}") from error
        try:
            with self._transaction() as db:
                _METADATA.create_all(db)
                known = db.execute(sa.select(_RUN.c.id)).scalar()
                self.run: str = known or uuid.uuid4().hex
                if known is None:
                    db.execute(_RUN.insert().values(id=self.run))
                self.newest: int = db.execute(sa.select(sa.func.max(_EVENTS.c.seq))).scalar() or 0
        except DataError:
            self.close()
            raise
        if known is None:
            self._reached("run-named")

    def append(self, body: bytes) -> None:
        """Returns once `body` is on disk. Raises: DataError: it is not, or nobody knows (`lost`)."""
        with self._transaction() as db:
            db.execute(_EVENTS.insert().values(seq=self.newest + 1, body=body))
            self._reached("event-written")
        self.newest += 1
        self._reached("event-committed")

    def check(self) -> None:
        """Commits something that changes nothing. Raises: DataError: the database takes no writes."""
        with self._transaction() as db:
            db.execute(_RUN.update().values(id=self.run))

    def read(self, after: int = 0) -> Iterator[bytes]:
        """All events after the one of this number, oldest first. Raises: DataError."""
        while True:
            some = sa.select(_EVENTS).where(_EVENTS.c.seq > after).order_by(_EVENTS.c.seq).limit(PAGE)
            with self._transaction() as db:
                rows = db.execute(some).all()
            if not rows:
                return
            yield from (bytes(row.body) for row in rows)
            after = rows[-1].seq

    def keep_snapshot(self, program: str, body: bytes) -> None:
        """Keeps what `program` made of all events, and of older ones the newest. Raises: DataError: it is not on disk."""
        sha256 = hashlib.sha256(body).hexdigest()
        before = sa.select(sa.func.max(_SNAPSHOTS.c.after)).where(_SNAPSHOTS.c.after < self.newest)
        with self._transaction() as db:
            oldest = db.execute(before).scalar() or 0
            db.execute(_SNAPSHOTS.delete().where((_SNAPSHOTS.c.after < oldest) | (_SNAPSHOTS.c.after >= self.newest)))
            db.execute(_SNAPSHOTS.insert().values(after=self.newest, program=program, sha256=sha256, body=body))
            self._reached("snapshot-written")
        self._reached("snapshot-committed")

    def snapshots(self, program: str) -> Iterator[tuple[int, bytes]]:
        """What `program` has kept and is whole, newest first: after which event, and the bytes. Raises: DataError."""
        of = sa.select(_SNAPSHOTS).where(_SNAPSHOTS.c.program == program, _SNAPSHOTS.c.after <= self.newest)
        with self._transaction() as db:
            rows = db.execute(of.order_by(_SNAPSHOTS.c.after.desc())).all()
        return ((row.after, bytes(row.body)) for row in rows if hashlib.sha256(row.body).hexdigest() == row.sha256)

    def close(self) -> None:
        self._connection.close()
        self._engine.dispose()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        """All of it is on disk afterwards, or nothing; one at a time. Raises: DataError: it is not, or nobody knows (`lost`)."""
        with self._one:
            if self.lost or self._connection.closed:
                raise DataError(f"the connection to {self._name} is lost or closed; start the server again")
            try:
                with self._connection.begin():
                    yield self._connection
            except sa.exc.DBAPIError as error:
                self.lost = self.lost or error.connection_invalidated
                raise DataError(f"{self._name} cannot be used: {error.orig}; mend it, or restore it from a backup") from error


def _durable(connection: Any, _: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def _only_writer(connection: Any, _: object) -> None:
    """Makes commits wait for the disk, whatever the database's default is, and holds the lock as long as the connection lives."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'")
        cursor.execute(f"SET lock_timeout = '{LOCK_SECONDS}s'")
        cursor.execute("SELECT pg_advisory_lock(%s, hashtext(coalesce(current_schema(), '')))", [_LOCK])
        cursor.execute("RESET lock_timeout")
    connection.commit()


class Blobs:
    """Files named by their content; writing one twice is harmless."""

    def __init__(self, folder: Path, reached: Reached = nothing) -> None:
        self._folder, self.reached = folder, reached
        files.make_folder(folder)
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
        self.reached("blob-synced")
        incoming.replace(self._folder / sha256)
        self.reached("blob-renamed")
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
