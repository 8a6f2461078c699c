"""A blob that was kept is there after any crash, whole, under its own name; nothing else can be named."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import DataError
from edge_server.storage import Blobs
from tests import strategies  # noqa: F401  # its hypothesis profile

BODY = b"a LoRA update"
SHA256 = hashlib.sha256(BODY).hexdigest()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


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


def test_the_folder_of_blobs_is_on_disk_before_a_blob_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that had to be made above it, and at every start, since the one before may have been killed in between."""
    synced = list[str]()
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    Blobs(tmp_path / "a" / "data" / "blobs")

    assert set(synced) == {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "data")}
    synced.clear()
    Blobs(tmp_path / "a" / "data" / "blobs")
    assert synced == [str(tmp_path / "a" / "data")]


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
