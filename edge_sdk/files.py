"""Files that are whole or not there: written aside, synced, renamed; secrets; transactions; folders that one process holds."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_sdk.errors import SettingsError


def write(path: Path, body: bytes, durable: bool = True) -> None:
    """Makes `body` the content of `path`; after a power cut the file has its old content or this one.

    Args:
        durable: wait for the disk; otherwise only a killed process cannot tear the file, for what can be made again.
    """
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("wb") as file:
            file.write(body)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise
    if durable:
        sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it that are not there; returns once their names are on disk."""
    made = [each for each in folder.parents if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in (folder, *made):
        sync_folder(each.parent)


def secret(path: Path, make: Callable[[], bytes]) -> bytes:
    """The content of `path`; made at the first call, and nobody but the owner may read it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".part")
        aside.unlink(missing_ok=True)
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(make())
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)
    return path.read_bytes()


def sync_folder(folder: Path) -> None:
    """Returns once the folder's list of names is on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Holds `folder` for this process; the lock goes when the process ends, however it ends.

    Raises:
        SettingsError: another process holds it; `what` names its program.
    """
    if not folder.is_dir():
        make_folder(folder)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsError(f"another {what} already uses {folder}; stop it, or choose another folder") from error
        yield


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of what is done inside is in the database, or nothing; for a connection in autocommit mode."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite takes it back itself when the disk is full
            db.execute("ROLLBACK")
        raise
