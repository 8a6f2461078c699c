"""One contract for the event log on both databases: what was appended is there after any crash, in order, of one writer."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from edge_sdk.errors import DataError, SettingsError
from edge_server import storage
from edge_server.storage import EventLog
from tests.databases import Postgres

# Goes on where the log stands, and prints every number after `append` has returned.
APPEND_FOR_EVER = """
import sys
import sqlalchemy as sa
from edge_server.storage import EventLog

log = EventLog(sa.make_url(sys.argv[1]))
number = sum(1 for _ in log.read())
while True:
    log.append(str(number).encode())
    print(number, flush=True)
    number += 1
"""


@dataclass(frozen=True)
class Database:
    """One to write to; `outside` reads and changes what is committed, past the log and its lock."""

    url: sa.URL

    @contextmanager
    def open(self) -> Iterator[EventLog]:
        with closing(EventLog(self.url)) as log:
            yield log

    def read(self) -> list[bytes]:
        with self.open() as log:
            return list(log.read())

    def outside(self, statement: str, **values: object) -> list[tuple[object, ...]]:
        engine = sa.create_engine(self.url, poolclass=sa.NullPool)
        with engine.begin() as connection:
            result = connection.execute(sa.text(statement), values)
            return [tuple(row) for row in result] if result.returns_rows else []


@pytest.fixture
def database(tmp_path: Path, state: str) -> Database:
    return Database(storage.postgresql(state) if state else storage.sqlite(tmp_path / "deep" / "events.sqlite"))


@pytest.fixture
def on_postgres(postgres: Postgres) -> Database:
    return Database(storage.postgresql(postgres.create()))


# Events ---------------------------------------------------------------------------------------------------------------
def test_events_come_back_in_order(database: Database) -> None:
    """Bodies are bytes, not text, and a reopened log goes on at its end."""
    bodies = [b"first", b"", b"\x00\xff{", "Grüße".encode("utf-16"), b"first"]
    for body in bodies:
        with database.open() as log:
            log.append(body)

    assert database.read() == bodies
    with database.open() as log:
        assert log.newest == 5
        assert list(log.read(after=3)) == bodies[3:]


def test_a_log_longer_than_a_page_comes_back_whole(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading goes in pages; what is appended meanwhile is read too."""
    monkeypatch.setattr(storage, "PAGE", 3)
    with database.open() as log:
        for number in range(7):
            log.append(b"%d" % number)
        events = log.read()
        read = [next(events)]
        log.append(b"7")

        assert read + list(events) == [b"%d" % number for number in range(8)]


def test_a_body_of_megabytes_comes_back(database: Database) -> None:
    """Larger than any message a device may send."""
    body = random.Random(1).randbytes(16 << 20)
    with database.open() as log:
        log.append(body)

        assert list(log.read()) == [body]


def test_an_event_is_readable_from_outside_once_append_returned(database: Database) -> None:
    """Nothing is held back in the writing process."""
    with database.open() as log:
        log.append(b"event")

        assert database.outside("SELECT seq, body FROM events") == [(1, b"event")]


def test_appends_of_many_threads_are_numbered_without_gaps(database: Database) -> None:
    """Each is there once, and a thread's own are in its order."""
    with database.open() as log:

        def work(thread: int) -> None:
            for number in range(20):
                log.append(b"%d %d" % (thread, number))

        threads = [threading.Thread(target=work, args=[i]) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = [tuple(map(int, body.split())) for body in log.read()]

    assert database.outside("SELECT min(seq), max(seq), count(*) FROM events") == [(1, 80, 80)]
    assert all([n for t, n in found if t == thread] == list(range(20)) for thread in range(4))


def test_a_failed_append_leaves_nothing_and_the_log_goes_on(database: Database) -> None:
    """An event that another writer smuggled in takes the number: two writers cannot both be believed."""
    with database.open() as log:
        log.append(b"one")
        database.outside("INSERT INTO events (seq, body) VALUES (2, :body)", body=b"smuggled")
        with pytest.raises(DataError, match="cannot be used"):
            log.append(b"two")
        assert not log.lost
        database.outside("DELETE FROM events WHERE seq = 2")
        log.append(b"two")

        assert list(log.read()) == [b"one", b"two"]


def test_a_closed_log_takes_nothing(database: Database) -> None:
    """Closing is final; it opens no connection again by itself."""
    with database.open() as log:
        log.append(b"event")
    with pytest.raises(DataError, match="lost or closed"):
        log.append(b"late")
    with pytest.raises(DataError, match="lost or closed"):
        list(log.read())

    assert database.read() == [b"event"]


def test_a_database_has_one_run(database: Database) -> None:
    """Its id is made with it and stays."""
    with database.open() as log:
        run = log.run
    with database.open() as again:
        assert again.run == run
    assert database.outside("SELECT id FROM run") == [(run,)]


@pytest.mark.slow
def test_appended_events_survive_sigkill(database: Database) -> None:
    """Killed at any moment, the log holds every event whose append returned, in order, and at most one more; it opens at once."""
    moment = random.Random(7)
    printed = -1
    for _ in range(5):
        command = [sys.executable, "-c", APPEND_FOR_EVER, str(database.url)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(moment.randint(1, 60)):
                printed = int(process.stdout.readline())
            process.kill()
            for line in process.stdout:
                printed = int(line) if line.endswith("\n") else printed

        log = database.read()
        assert log == [str(number).encode() for number in range(len(log))]
        assert printed + 1 <= len(log) <= printed + 2


# Snapshots ------------------------------------------------------------------------------------------------------------
def taken(log: EventLog, *bodies: bytes) -> None:
    for body in bodies:
        log.append(b"event")
        log.keep_snapshot("program", body)


def test_the_newest_snapshot_and_the_one_before_are_kept(database: Database) -> None:
    """Each says after which event it was taken; older ones go."""
    with database.open() as log:
        taken(log, b"a", b"b", b"\x00\xff")

        assert list(log.snapshots("program")) == [(3, b"\x00\xff"), (2, b"b")]
        log.keep_snapshot("program", b"again")
        assert list(log.snapshots("program")) == [(3, b"again"), (2, b"b")]


def test_a_snapshot_of_another_program_is_none(database: Database) -> None:
    """It is not handed out, and gives way to the next."""
    with database.open() as log:
        taken(log, b"a")

        assert list(log.snapshots("newer")) == []
        log.keep_snapshot("newer", b"b")
        assert list(log.snapshots("newer")) == [(1, b"b")]
        assert list(log.snapshots("program")) == []


def test_a_damaged_snapshot_is_passed_over(database: Database) -> None:
    """Its bytes are not what was kept."""
    with database.open() as log:
        taken(log, b"a", b"b")
        database.outside("UPDATE snapshots SET body = :body WHERE after = 2", body=b"B")

        assert list(log.snapshots("program")) == [(1, b"a")]


def test_a_snapshot_of_events_that_are_gone_is_none(database: Database) -> None:
    """Events decide: a log that was cut has no use for what came of its end."""
    with database.open() as log:
        taken(log, b"a", b"b")
    database.outside("DELETE FROM events WHERE seq = 2")
    with database.open() as log:
        assert list(log.snapshots("program")) == [(1, b"a")]
        taken(log, b"c")
        assert list(log.snapshots("program")) == [(2, b"c"), (1, b"a")]


# SQLite ---------------------------------------------------------------------------------------------------------------
def test_an_append_waits_for_the_disk(tmp_path: Path) -> None:
    """The file is in WAL mode, the one that is fsynced at every commit with synchronous=FULL."""
    with closing(EventLog(storage.sqlite(tmp_path / "events.sqlite"))) as log:
        pragmas = [log._connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]

    assert pragmas == ["wal", 2]  # 2 is FULL
    assert sqlite3.connect(tmp_path / "events.sqlite").execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_an_odd_folder_is_no_part_of_a_url(tmp_path: Path) -> None:
    """A name with what URLs have a use for is a name."""
    path = tmp_path / "100% of it?x=1#y" / "events.sqlite"
    EventLog(storage.sqlite(path)).close()

    assert path.is_file()


def test_a_file_that_is_no_log_is_named(tmp_path: Path) -> None:
    """A damaged file is an error that says what to do, and is not overwritten."""
    (tmp_path / "events.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(DataError, match=r"events\.sqlite cannot be used"):
        EventLog(storage.sqlite(tmp_path / "events.sqlite"))
    assert (tmp_path / "events.sqlite").read_bytes() == b"not a database" * 100


# PostgreSQL -----------------------------------------------------------------------------------------------------------
def test_commits_wait_for_the_disk_whatever_the_default_is(on_postgres: Database) -> None:
    """A database whose administrator prefers speed is asked for durability in each session."""
    options = on_postgres.url.query["options"]
    fast = Database(on_postgres.url.update_query_dict({"options": f"{options} -csynchronous_commit=off"}))
    assert fast.outside("SHOW synchronous_commit") == [("off",)]
    with fast.open() as log:
        assert log._connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"


def test_a_second_writer_is_refused(on_postgres: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says why, and may come when the first is gone."""
    monkeypatch.setattr(storage, "LOCK_SECONDS", 1)
    with on_postgres.open() as first:
        with pytest.raises(SettingsError, match="another edge-server already uses postgresql"):
            EventLog(on_postgres.url)
        first.append(b"event")

    assert on_postgres.read() == [b"event"]


def test_a_writer_whose_schema_is_another_is_let_in(on_postgres: Database, postgres: Postgres) -> None:
    """Runs may share a database, each in a schema of its own."""
    with on_postgres.open() as one, Database(storage.postgresql(postgres.create())).open() as two:
        one.append(b"one")
        two.append(b"two")

        assert (list(one.read()), list(two.read())) == ([b"one"], [b"two"])
        assert one.run != two.run


def test_a_text_database_that_is_not_utf8_keeps_bytes(postgres: Postgres) -> None:
    """What PostgreSQL takes a text for is none of our business."""
    with postgres.ask() as db:
        db.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with closing(EventLog(storage.postgresql(postgres.url("latin")))) as log:
        log.append("{Ω\x00".encode())

        assert list(log.read()) == ["{Ω\x00".encode()]


def test_a_connection_that_is_lost_stays_lost(on_postgres: Database, postgres: Postgres) -> None:
    """Nothing is acknowledged from then on, although the database would answer: the lock may be another's by now."""
    log = EventLog(on_postgres.url)
    log.append(b"before")
    postgres.hang_up()
    with pytest.raises(DataError, match="cannot be used"):
        log.append(b"after")
    assert log.lost
    with pytest.raises(DataError, match="lost or closed; start the server again"):
        log.append(b"after")
    with on_postgres.open() as successor:
        successor.append(b"of the next server")
    log.close()

    assert on_postgres.read() == [b"before", b"of the next server"]


@pytest.mark.parametrize(
    "url", ["mysql://host/db", "sqlite:///events.sqlite", "postgresql+asyncpg://host/db", "postgres", "", "postgresql://h:x/"]
)
def test_what_is_no_postgresql_url_is_refused(url: str) -> None:
    """And the message repeats no password."""
    with pytest.raises(SettingsError, match="--state is"):
        storage.postgresql(url)


@pytest.mark.parametrize(
    "named",
    [lambda port: f"postgresql://edge:secret@127.0.0.1:{port}/absent", lambda _: "postgresql://edge:secret@127.0.0.1:1/absent"],
)
def test_a_database_that_is_not_there_is_named(postgres: Postgres, named: Callable[[int], str]) -> None:
    """Without the password that led there."""
    with pytest.raises(DataError, match="absent cannot be used") as refused:
        EventLog(storage.postgresql(named(postgres.port)))

    assert "secret" not in str(refused.value)
