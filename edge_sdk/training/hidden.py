"""What enters the trained layers, computed once: hidden states of the frozen trunk, cached on disk in float16.

The trunk is the bundle's quantized graph up to the split; its output for a text changes only with the bundle, the split or
the adapter below it, so these name the cache, and under another name the file is emptied. One SQLite file: a chunk of texts
is there or not, every text has a checksum, and whatever cannot be read or written is computed again. A damaged file is begun
anew, and at the limit the texts of earlier jobs go. Source of the idea: Skip2-LoRA (arXiv 2410.21073).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sqlite3
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import DataError
from edge_sdk.files import transaction
from edge_sdk.tokens import Ids, by_tokens

CHUNK = 16  # texts computed and written together at most
States = NDArray[np.float32]  # (tokens, width)
_DISK = tuple(f"SQLITE_{name}" for name in ("FULL", "IOERR", "READONLY", "CANTOPEN", "BUSY", "LOCKED", "PERM"))
_SCHEMA = """
CREATE TABLE IF NOT EXISTS name (key TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS states (text BLOB PRIMARY KEY, scale REAL NOT NULL, crc INTEGER NOT NULL, body BLOB NOT NULL);
"""


class HiddenStates:
    """Gives the hidden states of token sequences, from disk where they are.

    Args:
        compute: the trunk; (tokens, width) for each sequence.
        key: names everything the states depend on but the text.
        path: the cache file; None keeps nothing.
        limit: bytes the file may have; what does not fit is computed every time.
        say: told in one line when the cache cannot be used.
        micro_tokens: computed at a time at most, padding counted; a longer text stands alone. Where memory is short it shrinks.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Ids]], list[States]],
        key: str,
        path: Path | None,
        limit: int = 1 << 30,
        say: Callable[[str], None] = lambda _: None,
        micro_tokens: int = 512,
    ) -> None:
        self._compute, self.key, self._path, self._limit, self._say = compute, key, path, limit, say
        self._micro_tokens = micro_tokens
        self._db: sqlite3.Connection | None = None
        self._job: dict[bytes, Ids] = {}  # what is not to be deleted when the limit is reached
        self._full, self._renewed = path is None, False
        self._open()

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def missing(self, sequences: Sequence[Ids]) -> list[Ids]:
        """Those of `sequences` that are not on disk, each once, shortest first; none where nothing more can be kept.

        They are the job from now on: only other texts are deleted for them.
        """
        distinct = {_name(ids): ids for ids in sequences}
        if self._db is not None and distinct.keys() != self._job.keys():
            self._job, self._full = distinct, False
        if self._full:
            return []
        db = self._db
        absent = [ids for name, ids in distinct.items() if self._find(name) is None]
        if self._db is not db:  # found damaged and begun anew: what was there is gone
            absent = list(distinct.values())
        return [] if self._full else sorted(absent, key=_order)

    def advance(self, missing: Sequence[Ids], budget: float, clock: Callable[[], float] = time.monotonic) -> list[Ids]:
        """Computes and keeps what `missing` gave, for about `budget` seconds but at least a chunk; returns what is left.

        Chunks are the same again after a power cut, shortest first.

        Raises:
            DataError: there is not enough memory for a text.
        """
        end, left = clock() + budget, sorted(missing, key=_order)
        while left:
            db, count = self._db, len(next(by_tokens(left[:CHUNK], self._micro_tokens)))
            chunk, left = left[:count], left[count:]
            self._keep(chunk, self._computed(chunk))
            if self._full:
                return []
            if self._db is not db:  # found damaged and begun anew: what was there is gone
                left = self.missing(list(self._job.values()))
            if clock() >= end:
                break
        return left

    def read(self, sequences: Sequence[Ids]) -> list[States]:
        """The hidden states (tokens, width) of each sequence, as float32, rounded to float16 whether they were on disk or not.

        Raises:
            DataError: there is not enough memory for a text.
        """
        kept = [self._find(_name(ids)) for ids in sequences]
        absent = [i for i, states in enumerate(kept) if states is None]
        for i, packed in zip(absent, self._computed([sequences[i] for i in absent]), strict=True):
            kept[i] = packed
        return [_unpack(*packed, len(ids)) for packed, ids in zip(kept, sequences, strict=True) if packed is not None]

    # On disk ----------------------------------------------------------------------------------------------------------
    def _open(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=30)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")  # losing the last chunk costs its time, nothing else
            self._db.executescript(_SCHEMA)
            if (known := [row[0] for row in self._db.execute("SELECT key FROM name")]) != [self.key]:
                if known:
                    self._say("the bundle, the split or the adapter below it changed; hidden states are computed anew")
                self._db.executescript("BEGIN; DELETE FROM states; DELETE FROM name; COMMIT; VACUUM;")
                self._db.execute("INSERT INTO name VALUES (?)", (self.key,))
        except sqlite3.Error as error:
            self._failed(error)

    def _failed(self, error: sqlite3.Error) -> None:
        """Goes on without a file if the disk is at fault. A damaged file is begun anew; a second one is the disk's fault too."""
        self.close()
        if self._path is None or self._renewed or _disk(error):
            self._full = True
            self._say(f"{self._path} cannot be used ({error}); hidden states are computed every time")
            return
        self._renewed = True
        self._say(f"{self._path} is damaged ({error}); hidden states are computed anew")
        with contextlib.suppress(OSError):
            for part in (*self._path.parent.glob(self._path.name + "-*"), self._path):  # an old log must not meet a new file
                part.unlink(missing_ok=True)
        self._open()

    def _find(self, name: bytes) -> tuple[float, bytes] | None:
        if self._db is None:
            return None
        try:
            row = self._db.execute("SELECT scale, crc, body FROM states WHERE text = ?", (name,)).fetchone()
        except sqlite3.Error as error:
            self._failed(error)
            return None
        if row is None or not isinstance(row[0], float) or not isinstance(row[2], bytes):
            return None
        return (row[0], row[2]) if row[1] == _crc(name, row[0], row[2]) else None

    def _keep(self, sequences: Sequence[Ids], packed: Sequence[tuple[float, bytes]]) -> None:
        names = [_name(ids) for ids in sequences]
        rows = [(name, scale, _crc(name, scale, body), body) for name, (scale, body) in zip(names, packed, strict=True)]
        while self._db is not None and not self._full:  # a second time where the file was damaged
            try:
                if not self._room(self._db, sum(len(body) for *_, body in rows)):
                    self._full = True
                    said = f"the cache of hidden states is full at {self._limit / 1e6:.0f} MB"
                    self._say(f"{said}; the rest is computed every time")
                    return
                with transaction(self._db):
                    self._db.executemany("INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?)", rows)
                return
            except sqlite3.Error as error:
                if not _disk(error):
                    self._failed(error)
                    continue
                self._full = True
                self._say(f"{self._path} takes no more ({error}); the rest of the hidden states is computed every time")

    def _room(self, db: sqlite3.Connection, more: int) -> bool:
        """Whether `more` bytes stay below the limit, if need be without SQLite's log, then without the texts of other jobs."""

        def fits() -> bool:
            page, free = (int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("page_size", "freelist_count"))
            return self.size() - page * free + more <= self._limit

        if fits():
            return True
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        if fits():
            return True
        if gone := [row for row in db.execute("SELECT text FROM states") if row[0] not in self._job]:
            with transaction(db):
                db.executemany("DELETE FROM states WHERE text = ?", gone)
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return fits()

    def size(self) -> int:
        """Bytes on disk."""
        if self._path is None:
            return 0
        return sum(part.stat().st_size for part in self._path.parent.glob(self._path.name + "*") if part.is_file())

    def _computed(self, sequences: Sequence[Ids]) -> list[tuple[float, bytes]]:
        """Packed states of each sequence, `micro_tokens` at a time; in halves, from then on, where memory is short."""
        out: list[tuple[float, bytes]] = [(1.0, b"")] * len(sequences)
        waiting = list(range(len(sequences)))
        while waiting:
            batch = [waiting[at] for at in next(by_tokens([sequences[i] for i in waiting], self._micro_tokens))]
            longest = len(sequences[batch[-1]])
            try:
                for i, states in zip(batch, self._compute([sequences[i] for i in batch]), strict=True):
                    out[i] = _pack(states)
                waiting = [i for i in waiting if i not in batch]
            except MemoryError as error:
                if len(batch) == 1:
                    raise DataError(
                        f"a text of {longest} tokens is too long for the memory of this device: lower task.max_tokens, or free "
                        "memory"
                    ) from error
                self._micro_tokens = len(batch) // 2 * longest
        return out


def _order(ids: Ids) -> tuple[int, Ids]:
    return len(ids), ids


def _disk(error: sqlite3.Error) -> bool:
    """Whether the disk is at fault, not the file; by SQLite's name, as its words for a damaged file speak of a disk too."""
    return str(getattr(error, "sqlite_errorname", "")).startswith(_DISK)


def _crc(name: bytes, scale: float, body: bytes) -> int:
    """Covers the name too: in a damaged index it may lead to another text's row."""
    return zlib.crc32(body, zlib.crc32(name + struct.pack("<d", scale)))


def _name(ids: Ids) -> bytes:
    return hashlib.sha256(np.asarray(ids, "<i8").tobytes()).digest()[:16]


def _pack(states: States) -> tuple[float, bytes]:
    """float16, divided by a power of two where a value would leave its range: some models' first token is huge."""
    largest = float(np.abs(states).max(initial=0))
    scale = 2.0 ** math.ceil(math.log2(largest / 32768)) if 32768 < largest < math.inf else 1.0
    return scale, (states / np.float32(scale)).astype("<f2").tobytes()


def _unpack(scale: float, body: bytes, tokens: int) -> States:
    half = np.frombuffer(body, "<f2").reshape(tokens, -1)
    return half.astype(np.float32) * np.float32(scale)
