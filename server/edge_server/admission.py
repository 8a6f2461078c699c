"""Who may take part: one-time tokens, the devices they admitted, and those that are shut out; one SQLite file.

Apart from the event log, because it says nothing of what is learned, and because the operator's commands change it while a
server runs: each method is one transaction, on disk before it returns, and every process sees it at once. Of a token only the
hash is kept.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path

from edge_sdk import files
from edge_sdk.errors import DataError, SettingsError, WireError

NAME = "admission.sqlite"
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


class Admission:
    """Opens or makes the file in the data folder; safe to use from several threads and processes."""

    def __init__(self, data: Path) -> None:
        data.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(data / NAME, check_same_thread=False, isolation_level=None, timeout=30)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise DataError(f"{data / NAME} cannot be used ({error}); restore it from a backup") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def mint(self, label: str, expires: float, now: float) -> tuple[Token, str]:
        """A token, and the text that is given to one device and kept nowhere."""
        id, secret = secrets.token_hex(4), secrets.token_hex(16)
        token = Token(id, _sha256(secret), label, now, expires)
        with self._lock:
            self._db.execute(
                "INSERT INTO tokens (id, sha256, label, minted, expires) VALUES (?, ?, ?, ?, ?)",
                (token.id, token.sha256, token.label, token.minted, token.expires),
            )
        return token, f"{id}-{secret}"

    def tokens(self) -> list[Token]:
        """All of them, oldest first."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM tokens ORDER BY minted, id").fetchall()
        return [_token(row) for row in rows]

    def devices(self) -> dict[str, bool]:
        """Every device that was admitted, and whether it is shut out now."""
        with self._lock:
            return {str(id): bool(revoked) for id, revoked in self._db.execute("SELECT id, revoked FROM devices ORDER BY rowid")}

    def revoke_token(self, id: str) -> Token:
        """A token that is not used admits nobody any more. Raises: SettingsError: there is no such token."""
        with self._lock, files.transaction(self._db):
            if (token := self._find(id)) is None:
                raise SettingsError(f"there is no token {id!r}; `edge-server token list` shows them all")
            self._db.execute("UPDATE tokens SET revoked = 1 WHERE id = ?", (id,))
        return token

    def revoke_device(self, id: str) -> str:
        """Shuts a device out, and returns its id. Raises: SettingsError: no device's id begins so, or several do."""
        with self._lock, files.transaction(self._db):
            found = [row[0] for row in self._db.execute("SELECT id FROM devices") if id and str(row[0]).startswith(id)]
            if len(found) != 1:
                raise SettingsError(f"{len(found)} devices have an id that begins with {id!r}; see `edge-server device list`")
            self._db.execute("UPDATE devices SET revoked = 1 WHERE id = ?", (found[0],))
        return str(found[0])

    def admit(self, device: str, token: str, now: float) -> None:
        """Lets a device in that is in already, or brings a token, which is used up by it.

        Raises:
            WireError: `revoked`; `token-needed`: it is not in and brings none; `bad-token`.
        """
        with self._lock, files.transaction(self._db):
            if (revoked := self._revoked(device)) is not None:
                return _let_in(revoked)
            if not token:
                raise WireError("token-needed", "this server admits a device once, by a token; ask its operator for one", 403)
            id, _, secret = token.partition("-")
            check(self._find(id), secret, now)
            self._db.execute("UPDATE tokens SET device = ? WHERE id = ?", (device, id))
            self._db.execute("INSERT INTO devices (id, token) VALUES (?, ?)", (device, id))
        return None

    def known(self, device: str) -> None:
        """Raises: WireError: `unknown-device`: it has not been admitted; `revoked`: it is shut out."""
        with self._lock:
            revoked = self._revoked(device)
        if revoked is None:
            raise WireError("unknown-device", "enroll this device first", 403)
        _let_in(revoked)

    def _revoked(self, device: str) -> bool | None:
        row = self._db.execute("SELECT revoked FROM devices WHERE id = ?", (device,)).fetchone()
        return None if row is None else bool(row[0])

    def _find(self, id: str) -> Token | None:
        row = self._db.execute("SELECT * FROM tokens WHERE id = ?", (id,)).fetchone()
        return None if row is None else _token(row)


def _let_in(revoked: bool) -> None:
    if revoked:
        raise WireError("revoked", "the operator has shut this device out", 403)


def _token(row: tuple[str, str, str, float, float, str, int]) -> Token:
    return Token(*row[:6], revoked=bool(row[6]))


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
