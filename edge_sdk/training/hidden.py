"""What enters the trained layers, computed once: hidden states of the frozen trunk, cached on disk in float16.

The trunk is the bundle's quantized graph up to the split; its output for a text changes only with the bundle, the split or
the adapter below it, so these name the cache, and under another name the file is emptied. One SQLite file: a chunk of texts
is there or not, every text has a checksum, and whatever cannot be read or written is computed again. Source of the idea:
Skip2-LoRA (arXiv 2410.21073).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sqlite3
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_sdk.tokens import Ids, by_length

CHUNK = 16  # texts computed and written together
States = NDArray[np.float32]  # (tokens, width)
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
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Ids]], list[States]],
        key: str,
        path: Path | None,
        limit: int = 1 << 30,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._compute, self._key, self._path, self._limit, self._say = compute, key, path, limit, say
        self._db: sqlite3.Connection | None = None
        self._full = path is None
        if path is not None:
            self._open(path)

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def missing(self, sequences: Sequence[Ids]) -> list[Ids]:
        """Those of `sequences` that are not on disk, each once, shortest first; none where nothing more can be kept."""
        if self._full:
            return []
        distinct = {_name(ids): ids for ids in sequences}
        absent = [ids for name, ids in distinct.items() if self._find(name) is None]
        return sorted(absent, key=lambda ids: (len(ids), ids))

    def advance(self, missing: Sequence[Ids], budget: float, clock: Callable[[], float] = time.monotonic) -> list[Ids]:
        """Computes and keeps what `missing` gave, for about `budget` seconds but at least a chunk; returns what is left.

        Chunks are the same again after a power cut, shortest first.
        """
        end, left = clock() + budget, list(missing)
        while left:
            chunk, left = left[:CHUNK], left[CHUNK:]
            self._keep(chunk, self._computed(chunk))
            left = [] if self._full else left
            if clock() >= end:
                break
        return left

    def read(self, sequences: Sequence[Ids]) -> list[States]:
        """The hidden states (tokens, width) of each sequence, as float32, rounded to float16 whether they were on disk or not."""
        kept = [self._find(_name(ids)) for ids in sequences]
        absent = [i for i, states in enumerate(kept) if states is None]
        for i, packed in zip(absent, self._computed([sequences[i] for i in absent]), strict=True):
            kept[i] = packed
        return [_unpack(*packed, len(ids)) for packed, ids in zip(kept, sequences, strict=True) if packed is not None]

    # On disk ----------------------------------------------------------------------------------------------------------
    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        for again in (False, True):
            try:
                self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")  # losing the last chunk costs its time, nothing else
                self._db.executescript(_SCHEMA)
                if (known := [row[0] for row in self._db.execute("SELECT key FROM name")]) != [self._key]:
                    if known:
                        self._say("the bundle, the split or the adapter below it changed; hidden states are computed anew")
                    self._db.executescript("BEGIN; DELETE FROM states; DELETE FROM name; COMMIT; VACUUM;")
                    self._db.execute("INSERT INTO name VALUES (?)", (self._key,))
                return
            except sqlite3.Error as error:
                self.close()
                if again or "disk" in str(error):
                    self._stop(f"{path} cannot be used ({error}); hidden states are computed every time")
                    return
                self._say(f"{path} is damaged ({error}); hidden states are computed anew")
                with contextlib.suppress(OSError):
                    for part in (path, *path.parent.glob(path.name + "-*")):
                        part.unlink(missing_ok=True)

    def _find(self, name: bytes) -> tuple[float, bytes] | None:
        if self._db is None:
            return None
        try:
            row = self._db.execute("SELECT scale, crc, body FROM states WHERE text = ?", (name,)).fetchone()
        except sqlite3.Error as error:
            self._stop(f"{self._path} cannot be read ({error}); hidden states are computed every time")
            return None
        if row is None or zlib.crc32(row[2]) != row[1]:
            return None
        return float(row[0]), bytes(row[2])

    def _keep(self, sequences: Sequence[Ids], packed: Sequence[tuple[float, bytes]]) -> None:
        if self._db is None or self._full:
            return
        rows = [(_name(ids), scale, zlib.crc32(body), body) for ids, (scale, body) in zip(sequences, packed, strict=True)]
        try:
            if self.size() + sum(len(body) for *_, body in rows) > self._limit:
                self._full = True
                self._say(f"the cache of hidden states is full at {self._limit / 1e6:.0f} MB; the rest is computed every time")
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany("INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?)", rows)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            self._full = True
            self._say(f"{self._path} takes no more ({error}); the rest of the hidden states is computed every time")

    def size(self) -> int:
        """Bytes on disk."""
        if self._path is None:
            return 0
        return sum(part.stat().st_size for part in self._path.parent.glob(self._path.name + "*") if part.is_file())

    def _stop(self, reason: str) -> None:
        self.close()
        self._full = True
        self._say(reason)

    def _computed(self, sequences: Sequence[Ids]) -> list[tuple[float, bytes]]:
        out: list[tuple[float, bytes]] = [(1.0, b"")] * len(sequences)
        for batch in by_length(sequences, CHUNK):
            for i, states in zip(batch, self._compute([sequences[i] for i in batch]), strict=True):
                out[i] = _pack(states)
        return out


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
