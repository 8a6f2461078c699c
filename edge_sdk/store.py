"""What a device keeps: private examples, the outbox, and small facts, in one SQLite file that survives power loss.

Every method is one transaction, on disk before it returns. Private text never leaves this file but into the device's own
models; nothing here knows the network.
"""

from __future__ import annotations

import sqlite3
import threading
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_sdk import corpus
from edge_sdk.errors import DataError
from edge_sdk.files import transaction
from edge_sdk.protocol import Line, Sample, Withdrawal
from edge_sdk.tasks import Private, Task

NAME = "device.sqlite"
CURSOR = "synthetic"  # the fact that holds how much of the feed of synthetic data this device has
MEMBER = "member"  # the fact that holds what a device must remember of its cohort in secure averaging
SPENT = "spent"  # the fact that holds the newest version whose training was averaged in secure averaging
UNSEEN = "unseen.safetensors"  # the file that holds what was learned and is sent masked only
WORK = "work"  # the fact that holds training under way, to go on with after a power cut
_SET_FACT = "INSERT INTO facts VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS examples (
    id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE, label TEXT, truth TEXT, held_out INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS synthetic (seq INTEGER PRIMARY KEY, id TEXT NOT NULL, line BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS outbox (
    id INTEGER PRIMARY KEY CHECK (id = 1), content_type TEXT NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS residual (id INTEGER PRIMARY KEY CHECK (id = 1), body BLOB NOT NULL);
"""


@dataclass(frozen=True)
class Parcel:
    """A finished result that waits for the network."""

    content_type: str
    body: bytes


class Store:
    """Opens or makes the store in `home/device.sqlite`; safe to use from several threads."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(home / NAME, check_same_thread=False, isolation_level=None, timeout=30)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise DataError(f"{home / NAME} cannot be used ({error}); move it away to start afresh") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @property
    def device_id(self) -> str:
        """Made on first use, the same ever after."""
        with self._lock:
            self._db.execute("INSERT OR IGNORE INTO facts VALUES ('device', ?)", (uuid.uuid4().hex,))
            return str(self._db.execute("SELECT value FROM facts WHERE name = 'device'").fetchone()[0])

    def become(self, device_id: str) -> None:
        """Takes another id. Work and results under the old one are dropped: no server would take them from the new one."""
        if self.device_id != device_id:
            with self._lock, transaction(self._db):
                self._db.execute(_SET_FACT, ("device", device_id))
                self._db.execute("DELETE FROM outbox")
                self._db.execute("DELETE FROM facts WHERE name IN (?, ?)", (WORK, MEMBER))

    def fact(self, name: str) -> str | None:
        with self._lock:
            row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def set_fact(self, name: str, value: str) -> None:
        with self._lock:
            self._db.execute(_SET_FACT, (name, value))

    def drop_fact(self, name: str) -> None:
        with self._lock:
            self._db.execute("DELETE FROM facts WHERE name = ?", (name,))

    def add(self, text: str, label: str | None = None, truth: str | None = None, held_out: bool = False) -> None:
        """Keeps one text; see `add_all`."""
        self.add_all([(text, label, truth, held_out)])

    def add_all(self, rows: Iterable[tuple[str, str | None, str | None, bool]]) -> int:
        """Keeps (text, label, truth, held out) rows, all or none.

        A text already kept takes the new label, where there is one. Once held out, a text stays held out.

        Returns:
            How many rows were read.

        Raises:
            DataError: an empty text, one that is not valid Unicode, or a held-out one without a label.
        """
        checked = []
        for text, label, truth, held_out in rows:
            if not text.strip():
                raise DataError("an example needs text")
            if held_out and label is None:
                raise DataError("a held-out example needs a label")
            checked.append((text.strip(), label, truth, int(held_out)))
        try:
            with self._lock, transaction(self._db):
                self._db.executemany(
                    "INSERT INTO examples (text, label, truth, held_out) VALUES (?, ?, ?, ?) ON CONFLICT (text) DO UPDATE SET"
                    " label = coalesce(excluded.label, label), truth = coalesce(excluded.truth, truth),"
                    " held_out = max(excluded.held_out, held_out)",
                    checked,
                )
        except UnicodeEncodeError as error:
            raise DataError("an example is not valid Unicode") from error
        return len(checked)

    def counts(self) -> dict[str, int]:
        """How many examples are `labelled`, `unlabelled` and `held_out`."""
        with self._lock:
            row = self._db.execute(
                "SELECT coalesce(sum(held_out = 0 AND label IS NOT NULL), 0), coalesce(sum(held_out = 0 AND label IS NULL), 0),"
                " coalesce(sum(held_out), 0) FROM examples"
            ).fetchone()
        return dict(zip(("labelled", "unlabelled", "held_out"), row, strict=True))

    def private(self, task: Task) -> Private:
        """All examples; what was kept as a label is a class index, or the answer where the task's answers are texts.

        Raises:
            DataError: a stored label is not one of the task's.
        """
        with self._lock:
            rows = self._db.execute("SELECT text, label, truth, held_out FROM examples ORDER BY id").fetchall()
        return corpus.private(rows, task)

    def take_lines(self, lines: Iterable[Line]) -> None:
        """Keeps lines of the feed of synthetic data, and drops the samples they withdraw; all or none."""
        with self._lock, transaction(self._db):
            for line in lines:
                if isinstance(line, Withdrawal):
                    self._db.execute("DELETE FROM synthetic WHERE id = ?", (line.id,))
                else:
                    body = msgspec.json.encode(line)
                    self._db.execute("INSERT OR REPLACE INTO synthetic VALUES (?, ?, ?)", (line.seq, line.id, body))
                self._db.execute(_SET_FACT, (CURSOR, str(line.seq)))

    @property
    def cursor(self) -> int:
        """The last line of the feed that this device has; 0 before the first."""
        return int(self.fact(CURSOR) or 0)

    def feed_size(self) -> int:
        """Bytes of the samples of the feed that this device keeps."""
        with self._lock:
            return int(self._db.execute("SELECT total(length(line)) FROM synthetic").fetchone()[0])

    def synthetic(self, until: int) -> list[Sample]:
        """The samples of the feed up to a line, oldest first, without those withdrawn since."""
        with self._lock:
            rows = self._db.execute("SELECT line FROM synthetic WHERE seq <= ? ORDER BY seq", (until,)).fetchall()
        return [msgspec.json.decode(row[0], type=Sample) for row in rows]

    def drop_synthetic(self) -> None:
        """Forgets the feed, which belongs to one run."""
        with self._lock, transaction(self._db):
            self._db.execute("DELETE FROM synthetic")
            self._db.execute("DELETE FROM facts WHERE name = ?", (CURSOR,))

    def post(self, parcel: Parcel, residual: bytes | None = None) -> None:
        """Puts a result into the outbox, which holds at most one; the work it is the result of is forgotten.

        Args:
            residual: what rounding lost of the result, kept in place of what was lost before; None where nothing is rounded.
        """
        with self._lock, transaction(self._db):
            self._db.execute("INSERT OR REPLACE INTO outbox VALUES (1, ?, ?)", (parcel.content_type, parcel.body))
            self._db.execute("DELETE FROM facts WHERE name = ?", (WORK,))
            if residual is not None:
                self._db.execute("INSERT OR REPLACE INTO residual VALUES (1, ?)", (residual,))

    def residual(self) -> bytes | None:
        """What rounding lost of the last result that was posted with such a rest."""
        with self._lock:
            row = self._db.execute("SELECT body FROM residual").fetchone()
        return None if row is None else bytes(row[0])

    def drop_residual(self) -> None:
        with self._lock:
            self._db.execute("DELETE FROM residual")

    def pending(self) -> Parcel | None:
        with self._lock:
            row = self._db.execute("SELECT content_type, body FROM outbox").fetchone()
        return None if row is None else Parcel(str(row[0]), bytes(row[1]))

    def delivered(self) -> None:
        """Empties the outbox."""
        with self._lock:
            self._db.execute("DELETE FROM outbox")
