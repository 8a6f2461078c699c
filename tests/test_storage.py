"""What is on disk after a call returned is still there after any crash, and nothing else is."""

from __future__ import annotations

import hashlib
import random
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import DataError
from edge_server.storage import Blobs, EventLog
from tests import strategies  # noqa: F401  # its hypothesis profile

BODY = b"a LoRA update"
SHA256 = hashlib.sha256(BODY).hexdigest()

# Goes on where the log stands, and prints every number after `append` has returned.
APPEND_FOR_EVER = """
import sys
from pathlib import Path
from edge_server.storage import EventLog

log = EventLog(Path(sys.argv[1]))
number = sum(1 for _ in log.read())
while True:
    log.append(str(number).encode())
    print(number, flush=True)
    number += 1
"""


def read(path: Path) -> list[bytes]:
    log = EventLog(path)
    try:
        return list(log.read())
    finally:
        log.close()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Events ---------------------------------------------------------------------------------------------------------------
def test_events_come_back_in_order(tmp_path: Path) -> None:
    """Bodies are bytes, not text, and a reopened log goes on at its end."""
    bodies = [b"first", b"", b"\x00\xff{", b"first"]
    for body in bodies:
        log = EventLog(tmp_path / "deep" / "events.sqlite")
        log.append(body)
        log.close()

    assert read(tmp_path / "deep" / "events.sqlite") == bodies


def test_an_event_is_readable_from_outside_once_append_returned(tmp_path: Path) -> None:
    """Nothing is held back in the writing process."""
    log = EventLog(tmp_path / "events.sqlite")
    log.append(b"event")

    assert read(tmp_path / "events.sqlite") == [b"event"]
    log.close()


def test_an_append_waits_for_the_disk(tmp_path: Path) -> None:
    """The log runs in WAL mode, the one it is fsynced in at every commit with synchronous=FULL."""
    log = EventLog(tmp_path / "events.sqlite")
    with log._engine.connect() as connection:
        settings = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]

    assert settings == ["wal", 2]  # 2 is FULL
    log.close()


def test_a_file_that_is_no_log_is_named(tmp_path: Path) -> None:
    """A damaged file is an error that says what to do, and is not overwritten."""
    (tmp_path / "events.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(DataError, match=r"events\.sqlite cannot be used .*move it away"):
        EventLog(tmp_path / "events.sqlite")
    assert (tmp_path / "events.sqlite").read_bytes() == b"not a database" * 100


@pytest.mark.slow
def test_appended_events_survive_sigkill(tmp_path: Path) -> None:
    """Killed at any moment, the log holds every event whose append returned, in order, and at most one more."""
    path = tmp_path / "events.sqlite"
    moment = random.Random(7)
    printed = -1
    for _ in range(5):
        command = [sys.executable, "-c", APPEND_FOR_EVER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(moment.randint(1, 60)):
                printed = int(process.stdout.readline())
            process.kill()
            for line in process.stdout:
                printed = int(line) if line.endswith("\n") else printed

        log = read(path)
        assert log == [str(number).encode() for number in range(len(log))]
        assert printed + 1 <= len(log) <= printed + 2
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# Blobs ----------------------------------------------------------------------------------------------------------------
@given(st.binary(max_size=2000))
def test_a_blob_comes_back(body: bytes) -> None:
    """A blob is named by its sha256 and is there for a later process; nothing else stays in the folder."""
    with tempfile.TemporaryDirectory() as folder:
        sha256 = Blobs(Path(folder)).put(body)

        assert sha256 == hashlib.sha256(body).hexdigest()
        assert Blobs(Path(folder)).get(sha256) == body
        assert names(Path(folder)) == {sha256}


def test_putting_twice_is_harmless(tmp_path: Path) -> None:
    """The same bytes are one blob."""
    blobs = Blobs(tmp_path)

    assert blobs.put(BODY) == blobs.put(BODY) == SHA256
    assert names(tmp_path) == {SHA256}


def test_a_streamed_file_becomes_a_blob(tmp_path: Path) -> None:
    """What `incoming` gave and a handler filled is the blob after `keep`, and no longer incoming."""
    blobs = Blobs(tmp_path)
    incoming = blobs.incoming()
    incoming.write_bytes(BODY)
    blobs.keep(incoming, SHA256)

    assert blobs.get(SHA256) == BODY
    assert not incoming.exists()


def test_two_uploads_at_once_have_two_files(tmp_path: Path) -> None:
    """No upload writes into another's."""
    blobs = Blobs(tmp_path)

    assert blobs.incoming() != blobs.incoming()


@pytest.mark.parametrize("damaged", [b"", BODY[:-1], BODY + b"x", b"A" + BODY[1:]])
def test_a_damaged_blob_is_detected(tmp_path: Path, damaged: bytes) -> None:
    """Truncated, longer or changed: never handed out as if it were whole."""
    blobs = Blobs(tmp_path)
    blobs.put(BODY)
    (tmp_path / SHA256).write_bytes(damaged)
    with pytest.raises(DataError, match=f"{SHA256} is missing or damaged"):
        blobs.get(SHA256)


@pytest.mark.parametrize("body", [BODY, b""])
def test_a_missing_blob_is_an_error(tmp_path: Path, body: bytes) -> None:
    """Also the blob of no bytes, which an absent file must not pass for."""
    sha256 = hashlib.sha256(body).hexdigest()
    blobs = Blobs(tmp_path)

    assert blobs.path(sha256) is None
    with pytest.raises(DataError, match="missing or damaged"):
        blobs.get(sha256)


def test_leftover_uploads_are_removed_at_start(tmp_path: Path) -> None:
    """What a killed process was receiving goes, blobs stay."""
    Blobs(tmp_path).put(BODY)
    Blobs(tmp_path).incoming().write_bytes(b"half an upd")
    Blobs(tmp_path)

    assert names(tmp_path) == {SHA256}


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../events.sqlite",
        "../blobs/" + SHA256,
        "/etc/passwd",
        SHA256.upper(),
        SHA256[:-1],
        SHA256 + "0",
        SHA256 + "\n",
        SHA256[:-1] + "g",
        SHA256 + "\0",
        "incoming-12345678",
    ],
)
def test_only_a_sha256_in_lower_case_names_a_blob(tmp_path: Path, name: str) -> None:
    """Nothing outside the folder and nothing unfinished can be named, although it exists."""
    blobs = Blobs(tmp_path / "blobs")
    blobs.put(BODY)
    (tmp_path / "events.sqlite").write_bytes(b"secret")
    (tmp_path / "blobs" / "incoming-12345678").write_bytes(b"half")
    (tmp_path / "blobs" / SHA256.upper()).write_bytes(BODY)

    assert blobs.path(name) is None


def test_a_folder_is_no_blob(tmp_path: Path) -> None:
    """A name is not enough, it must be a file."""
    (tmp_path / SHA256).mkdir()

    assert Blobs(tmp_path).path(SHA256) is None


def test_a_bundle_file_is_served_where_it_lies(tmp_path: Path) -> None:
    """Adopting copies nothing and can be repeated at every start."""
    (tmp_path / "model.onnx").write_bytes(BODY)
    for _ in range(2):
        blobs = Blobs(tmp_path / "blobs")
        blobs.adopt(tmp_path / "model.onnx", SHA256)

    assert blobs.get(SHA256) == BODY
    assert (tmp_path / "blobs" / SHA256).is_symlink()


def test_a_bundle_may_move_between_two_starts(tmp_path: Path) -> None:
    """A link to where the file no longer is gives way to the new place."""
    (tmp_path / "old.onnx").write_bytes(BODY)
    blobs = Blobs(tmp_path / "blobs")
    blobs.adopt(tmp_path / "old.onnx", SHA256)
    (tmp_path / "old.onnx").rename(tmp_path / "new.onnx")
    assert blobs.path(SHA256) is None
    blobs.adopt(tmp_path / "new.onnx", SHA256)

    assert blobs.get(SHA256) == BODY
