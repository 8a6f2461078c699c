"""Who may take part: one-time tokens, the devices they admitted, and those that are shut out; one SQLite file.

Apart from the event log, because it says nothing of what is learned, and because the operator's commands change it while a
server runs: each method is one transaction, on disk before it returns, and every process sees it at once. Of a token only the
hash is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_sdk import files
from edge_sdk.errors import DataError, SettingsError, WireError
from edge_server.failpoints import Reached, nothing

NAME = "admission.sqlite"
PATIENCE = 5.0  # seconds that a change waits for another process
READ_PATIENCE = 0.1  # and a reader, which waits only for one that starts or ends; all of a server's requests wait with it
_SCHEMA = """
CREATE TABLE IF NOT EXISTS tokens (
    id TEXT PRIMARY KEY, sha256 TEXT NOT NULL, label TEXT NOT NULL, minted REAL NOT NULL, expires REAL NOT NULL,
    device TEXT NOT NULL DEFAULT '', revoked INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS devices (id TEXT PRIMARY KEY, token TEXT NOT NULL, revoked INTEGER NOT NULL DEFAULT 0);
"""


@dataclass(frozen=True)
class Token:
    """One admission. `expires` is in seconds since 1970, `device` the one it admitted, "" before that."""

    id: str
    sha256: str
    label: str
    minted: float
    expires: float
    device: str = ""
    revoked: bool = False

    def state(self, now: float) -> str:
        """In a word or two: `open`, `used`, `revoked` or `expired`."""
        if self.device:
            return "used"
        return "revoked" if self.revoked else "expired" if now >= self.expires else "open"


def check(token: Token | None, secret: str, now: float) -> None:
    """Whether `secret` is that of a token which is open. Raises: WireError: `bad-token`."""
    known = "" if token is None else token.sha256
    if not hmac.compare_digest(_sha256(secret), known) or token is None:
        raise WireError("bad-token", "this is no token of this server; ask its operator for one", 403)
    if (state := token.state(now)) != "open":
        raise WireError("bad-token", f"this token is {state}; ask the server's operator for another", 403)


def in_use(data: Path) -> bool:
    """Whether a token was ever minted for this data folder, or a device admitted; makes no file. Raises: as `Admission`."""
    if not (data / NAME).exists():
        return False
    with contextlib.closing(Admission(data)) as found:
        return bool(found.tokens() or found.devices())


class Admission:
    """Opens or makes the file in the data folder; safe to use from several threads and processes.

    Readers have a connection of their own: they do not wait for a change, whoever makes it and however long it takes.

    Raises:
        DataError: the file cannot be used; by every method.
        WireError: `busy`: another process has locked it; by every method.
    """

    def __init__(self, data: Path, reached: Reached = nothing) -> None:
        data.mkdir(parents=True, exist_ok=True)
        self._path, self._reached = data / NAME, reached
        self._lock, self._reading = threading.Lock(), threading.Lock()
        with self._told():
            self._db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None, timeout=PATIENCE)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
            self._view = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None, timeout=READ_PATIENCE)

    def close(self) -> None:
        with self._lock, self._reading:
            self._view.close()
            self._db.close()

    def mint(self, label: str, expires: float, now: float) -> tuple[Token, str]:
        """A token, and the text that is given to one device and kept nowhere."""
        id, secret = secrets.token_hex(4), secrets.token_hex(16)
        token = Token(id, _sha256(secret), label, now, expires)
        with self._changing() as db:
            db.execute(
                "INSERT INTO tokens (id, sha256, label, minted, expires) VALUES (?, ?, ?, ?, ?)",
                (token.id, token.sha256, token.label, token.minted, token.expires),
            )
        return token, f"{id}-{secret}"

    def tokens(self) -> list[Token]:
        """All of them, oldest first."""
        with self._looking() as db:
            return [_token(row) for row in db.execute("SELECT * FROM tokens ORDER BY minted, id")]

    def devices(self) -> dict[str, bool]:
        """Every device that was admitted, and whether it is shut out now."""
        with self._looking() as db:
            return {str(id): bool(revoked) for id, revoked in db.execute("SELECT id, revoked FROM devices ORDER BY rowid")}

    def revoke_token(self, id: str) -> Token:
        """A token that is not used admits nobody any more. Raises: SettingsError: there is no such token."""
        with self._changing() as db:
            if (token := _find(db, id)) is None:
                raise SettingsError(f"there is no token {id!r}; `edge-server token list` shows them all")
            db.execute("UPDATE tokens SET revoked = 1 WHERE id = ?", (id,))
        return token

    def revoke_device(self, id: str) -> str:
        """Shuts a device out, and returns its id. Raises: SettingsError: no device's id begins so, or several do."""
        with self._changing() as db:
            found = [row[0] for row in db.execute("SELECT id FROM devices") if id and str(row[0]).startswith(id)]
            if len(found) != 1:
                raise SettingsError(f"{len(found)} devices have an id that begins with {id!r}; see `edge-server device list`")
            db.execute("UPDATE devices SET revoked = 1 WHERE id = ?", (found[0],))
        return str(found[0])

    def is_in(self, device: str, token: str, now: float) -> bool:
        """Whether `admit` would change nothing; waits for nobody. Raises: WireError: what `admit` refuses."""
        with self._looking() as db:
            return _is_in(db, device, token, now)

    def admit(self, device: str, token: str, now: float) -> None:
        """Lets a device in that is in already, or brings a token, which is used up by it.

        Raises:
            WireError: `revoked`; `token-needed`: it is not in and brings none; `bad-token`.
        """
        with self._changing() as db:
            if not _is_in(db, device, token, now):
                id = token.partition("-")[0]
                db.execute("UPDATE tokens SET device = ? WHERE id = ?", (device, id))
                db.execute("INSERT INTO devices (id, token) VALUES (?, ?)", (device, id))

    def known(self, device: str) -> None:
        """Raises: WireError: `unknown-device`: it has not been admitted; `revoked`: it is shut out."""
        with self._looking() as db:
            if not _is_known(db, device):
                raise WireError("unknown-device", "enroll this device first", 403)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._told(), self._lock, files.transaction(self._db):
            yield self._db
            self._reached("admission-written")
        self._reached("admission-committed")

    @contextlib.contextmanager
    def _looking(self) -> Iterator[sqlite3.Connection]:
        with self._told(), self._reading:
            yield self._view

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What SQLite says, as an error that says what to do."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                said = f"another program has locked {NAME}; try again, and if it stays so, the operator must end what holds it"
                raise WireError("busy", said, 503, PATIENCE) from error
            raise DataError(f"{self._path} cannot be used ({error}); see to its disk, or restore it from a backup") from error


def _is_in(db: sqlite3.Connection, device: str, token: str, now: float) -> bool:
    """Whether a device is in; where it is not, its token is open. Raises: WireError: as `Admission.admit`."""
    if _is_known(db, device):
        return True
    if not token:
        raise WireError("token-needed", "this server admits a device once, by a token; ask its operator for one", 403)
    id, _, secret = token.partition("-")
    check(_find(db, id), secret, now)
    return False


def _is_known(db: sqlite3.Connection, device: str) -> bool:
    """Raises: WireError: `revoked`."""
    row = db.execute("SELECT revoked FROM devices WHERE id = ?", (device,)).fetchone()
    if row is not None and row[0]:
        raise WireError("revoked", "the operator has shut this device out", 403)
    return row is not None


def _find(db: sqlite3.Connection, id: str) -> Token | None:
    row = db.execute("SELECT * FROM tokens WHERE id = ?", (id,)).fetchone()
    return None if row is None else _token(row)


def _token(row: tuple[str, str, str, float, float, str, int]) -> Token:
    return Token(*row[:6], revoked=bool(row[6]))


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
