"""What a device keeps survives reopening, wrong input and SIGKILL."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import DataError
from edge_sdk.protocol import Line, Sample, Withdrawal
from edge_sdk.store import CURSOR, WORK, Parcel, Store
from edge_sdk.tasks import Example, Private, Task
from tests import strategies  # noqa: F401  # its hypothesis profile

TASK = Task(("no", "yes"), "{text}", ((" no",), (" yes",)))
Row = tuple[str, str | None, str | None, bool]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Opens the same store, any number of times."""
    stores: list[Store] = []

    def again() -> Store:
        stores.append(Store(tmp_path / "home"))
        return stores[-1]

    yield again
    for store in stores:
        store.close()


@pytest.fixture
def store(opened: Callable[[], Store]) -> Store:
    return opened()


# Reopening ------------------------------------------------------------------------------------------------------------
def test_everything_survives_reopening(opened: Callable[[], Store]) -> None:
    """Examples, facts, the outbox and the device's id are the same after the process is gone and back."""
    store = opened()
    store.add_all([("a", "yes", None, False), ("b", None, "no", False), ("c", "no", None, True)])
    store.set_fact("version", "3")
    store.post(Parcel("text/plain", b"body"))
    before = (store.private(TASK), store.counts(), store.fact("version"), store.pending(), store.device_id)
    store.close()
    again = opened()

    assert (again.private(TASK), again.counts(), again.fact("version"), again.pending(), again.device_id) == before
    assert again.pending() == Parcel("text/plain", b"body")


def test_a_device_id_is_made_once(opened: Callable[[], Store], tmp_path: Path) -> None:
    """The id stays, two openings at once agree on it, and another home has another."""
    first, second = opened(), opened()
    other = Store(tmp_path / "other")

    assert first.device_id == second.device_id == first.device_id
    assert len(first.device_id) == 32
    assert other.device_id != first.device_id
    other.close()


def test_facts_are_replaced(store: Store) -> None:
    """The newest value of a fact counts; a fact nobody set is None."""
    store.set_fact("version", "1")
    store.set_fact("version", "2")

    assert store.fact("version") == "2"
    assert store.fact("other") is None


def test_a_dropped_fact_is_no_fact(opened: Callable[[], Store]) -> None:
    """Dropping takes one fact away for good, leaves the others, and dropping what is not there is no error."""
    store = opened()
    store.set_fact("version", "1")
    store.set_fact("run", "a")
    store.drop_fact("version")
    store.drop_fact("version")
    store.close()

    assert opened().fact("version") is None
    assert opened().fact("run") == "a"


@pytest.mark.parametrize(
    "content", [b"this is no database, but long enough to be one" * 10, b"SQLite format 3\0" + b"\xff" * 200]
)
def test_a_file_that_is_no_database_is_said_to_be_one(tmp_path: Path, content: bytes) -> None:
    """A damaged store is a DataError that says what to do, and the file stays for whoever can mend it."""
    (tmp_path / "device.sqlite").write_bytes(content)

    with pytest.raises(DataError, match=r"device.sqlite cannot be used .*; move it away to start afresh"):
        Store(tmp_path)
    assert (tmp_path / "device.sqlite").read_bytes() == content


# Examples -------------------------------------------------------------------------------------------------------------
def test_examples_are_told_apart_by_their_use(store: Store) -> None:
    """Labelled, unlabelled with or without a truth, and held-out texts each go where they may be used, in order."""
    store.add("known", "yes")
    store.add("unknown")
    store.add("measured", truth="no")
    store.add("kept aside", "no", held_out=True)

    assert store.private(TASK) == Private(
        labelled=(Example("known", 1),),
        unlabelled=("unknown", "measured"),
        truths=(None, 0),
        held_out=(Example("kept aside", 0),),
    )
    assert store.counts() == {"labelled": 1, "unlabelled": 2, "held_out": 1}


def test_an_empty_store_is_empty(store: Store) -> None:
    """Nothing kept is nothing found, not an error."""
    assert store.private(TASK) == Private((), (), (), ())
    assert store.counts() == {"labelled": 0, "unlabelled": 0, "held_out": 0}
    assert store.pending() is None


def test_a_text_is_kept_once_and_gains_what_it_lacked(store: Store) -> None:
    """The same text, apart from space around it, is one example; a label comes to it later, and an older one is not lost."""
    store.add("a film")
    store.add("  a film\n", "yes")
    store.add("a film")

    assert store.private(TASK).labelled == (Example("a film", 1),)
    assert store.counts() == {"labelled": 1, "unlabelled": 0, "held_out": 0}


def test_a_new_label_replaces_the_old(store: Store) -> None:
    """Whoever corrects a label is believed."""
    store.add("a film", "yes")
    store.add("a film", "no")

    assert store.private(TASK).labelled == (Example("a film", 0),)


rows = st.lists(
    st.tuples(
        st.sampled_from("abcdef"), st.sampled_from([None, *TASK.labels]), st.sampled_from([None, *TASK.labels]), st.booleans()
    ).filter(lambda row: row[1] is not None or not row[3]),
    max_size=12,
)


@settings(max_examples=20)  # each on a disk of its own
@given(rows)
def test_once_held_out_always_held_out(tmp_path_factory: pytest.TempPathFactory, added: list[Row]) -> None:
    """Whatever is added afterwards, a text once held out is never trained on, and each text has exactly one use."""
    store = Store(tmp_path_factory.mktemp("home"))
    store.add_all(added)
    private = store.private(TASK)
    store.close()
    trained = [e.text for e in private.labelled] + list(private.unlabelled)

    assert {e.text for e in private.held_out} == {text for text, _, _, held_out in added if held_out}
    assert sorted(trained + [e.text for e in private.held_out]) == sorted({text for text, *_ in added})
    assert len(private.truths) == len(private.unlabelled)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (("", None, None, False), "needs text"),
        (("  \n", "yes", None, False), "needs text"),
        (("held", None, "yes", True), "held-out example needs a label"),
        (("\ud800", None, None, False), "not valid Unicode"),
        (("text", "\udfff", None, False), "not valid Unicode"),
    ],
)
def test_one_bad_row_keeps_all_out(store: Store, bad: Row, sentence: str) -> None:
    """Rows are kept all or none: one that breaks a rule leaves the store as it was, and usable."""
    store.add("before", "yes")
    with pytest.raises(DataError, match=sentence):
        store.add_all([("good", "yes", None, False), bad, ("also good", None, None, False)])

    assert store.counts() == {"labelled": 1, "unlabelled": 0, "held_out": 0}
    assert store.add_all([("good", "yes", None, False)]) == 1


def test_rows_that_stop_coming_keep_all_out(store: Store) -> None:
    """A source of rows that fails in the middle leaves nothing behind."""

    def failing() -> Iterator[Row]:
        yield "good", "yes", None, False
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        store.add_all(failing())
    assert store.counts() == {"labelled": 0, "unlabelled": 0, "held_out": 0}


@pytest.mark.parametrize(("label", "truth"), [("maybe", None), (None, "maybe")])
def test_a_label_of_another_task_is_refused(store: Store, label: str | None, truth: str | None) -> None:
    """A label or truth the task does not know is named, with the labels there are, and without the private text."""
    store.add("a film", label, truth)

    with pytest.raises(DataError, match="label 'maybe' is not one of this task's: no, yes; add its texts again") as caught:
        store.private(TASK)
    assert "a film" not in str(caught.value)


@pytest.mark.parametrize("text", ["a\0b", "😀", "'; DROP TABLE examples; --", "x" * 100_000, "e\u0301"])
def test_any_text_comes_back_as_it_was(store: Store, text: str) -> None:
    """Zeros, quotes, emoji and length do not change a text."""
    store.add(text, "yes")

    assert store.private(TASK).labelled == (Example(text, 1),)


def test_threads_may_share_a_store(store: Store) -> None:
    """Texts added from eight threads at once are all there, once."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.add(f"text {i % 40}", "yes"), range(80)))

    assert store.counts() == {"labelled": 40, "unlabelled": 0, "held_out": 0}


# Answers that are texts -----------------------------------------------------------------------------------------------
ANSWERS = Task((), "{text}", (), answer_tokens=8)


def test_what_was_kept_as_a_label_is_the_answer(store: Store) -> None:
    """Where answers are texts, any label will do, truths tell nothing, and each text keeps its use."""
    store.add("2 + 2", "four")
    store.add("3 + 3")
    store.add("4 + 4", truth="eight")
    store.add("5 + 5", "ten, or so", held_out=True)

    assert store.private(ANSWERS) == Private(
        labelled=(Example("2 + 2", answer="four"),),
        unlabelled=("3 + 3", "4 + 4"),
        truths=(None, None),
        held_out=(Example("5 + 5", answer="ten, or so"),),
    )
    with pytest.raises(DataError, match="is not one of this task's"):
        store.private(TASK)


def test_a_new_answer_replaces_the_old(store: Store) -> None:
    """A text that is answered again has the newer answer, and one."""
    store.add("2 + 2", "five")
    store.add("2 + 2", "four")

    assert store.private(ANSWERS).labelled == (Example("2 + 2", answer="four"),)


# Synthetic data -------------------------------------------------------------------------------------------------------
def sample(seq: int, name: str = "") -> Sample:
    return Sample(seq, name or f"s{seq}", f"text {seq}", "yes", (0.25, 0.75), 0.75, 2, "llm", "ab" * 32)


def test_lines_are_kept_in_order_with_all_their_fields(opened: Callable[[], Store]) -> None:
    """Page after page, samples come back as they were, oldest first, up to the line asked for; the cursor is the last line."""
    store = opened()
    assert (store.cursor, store.synthetic(99)) == (0, [])
    store.take_lines([sample(1), sample(2)])
    store.take_lines([sample(3)])
    store.take_lines([])

    assert store.cursor == 3
    assert [store.synthetic(until) for until in range(4)] == [[sample(i + 1) for i in range(until)] for until in range(4)]
    store.close()
    assert (opened().cursor, opened().synthetic(3)) == (3, [sample(1), sample(2), sample(3)])


def test_a_withdrawn_sample_is_gone(opened: Callable[[], Store]) -> None:
    """A withdrawal is a line like any other for the cursor; its sample goes, whenever it came, and no other."""
    store = opened()
    store.take_lines([sample(1), sample(2), Withdrawal(3, "s2"), sample(4), Withdrawal(5, "nobody")])
    assert (store.cursor, store.synthetic(9)) == (5, [sample(1), sample(4)])
    store.take_lines([Withdrawal(6, "s1")])
    store.close()

    assert (opened().cursor, opened().synthetic(9)) == (6, [sample(4)])


@settings(max_examples=20)  # each on a disk of its own
@given(st.lists(st.booleans(), max_size=12), st.data())
def test_pages_of_any_size_leave_the_same(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[bool], data: st.DataObject
) -> None:
    """However the feed is cut into pages, the store holds the samples that no later line withdraws."""
    names = st.sampled_from("abc")
    lines: list[Line] = [sample(i, f"s{i}") for i in range(1, 4)]
    for seq, keeps in enumerate(kinds, 4):
        lines.append(sample(seq) if keeps else Withdrawal(seq, f"s{data.draw(names.map('abc'.index)) + 1}"))
    store = Store(tmp_path_factory.mktemp("home"))
    rest = list(lines)
    while rest:
        size = data.draw(st.integers(1, 5))
        store.take_lines(rest[:size])
        rest = rest[size:]
    gone = {line.id for line in lines if isinstance(line, Withdrawal)}

    assert store.synthetic(99) == [line for line in lines if isinstance(line, Sample) and line.id not in gone]
    assert store.cursor == len(lines)
    store.close()


def test_lines_that_stop_coming_leave_nothing(store: Store) -> None:
    """Lines and cursor are one transaction: a page that fails in the middle neither adds, drops nor moves anything."""
    store.take_lines([sample(1)])

    def failing() -> Iterator[Line]:
        yield sample(2)
        yield Withdrawal(3, "s1")
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        store.take_lines(failing())
    assert (store.cursor, store.synthetic(9)) == (1, [sample(1)])
    store.take_lines([sample(2)])
    assert (store.cursor, store.synthetic(9)) == (2, [sample(1), sample(2)])


def test_a_run_is_forgotten_with_its_cursor(opened: Callable[[], Store]) -> None:
    """What belongs to another run is dropped, the next feed is read from its start, and other facts stay."""
    store = opened()
    store.set_fact("version", "3")
    store.take_lines([sample(1), sample(2)])
    store.drop_synthetic()
    store.drop_synthetic()

    again = opened()
    assert (again.cursor, again.synthetic(9), again.fact("version")) == (0, [], "3")
    again.take_lines([sample(1, "other")])
    assert again.synthetic(9) == [sample(1, "other")]


def test_samples_and_cursor_are_dropped_together(store: Store) -> None:
    """Where the cursor cannot be dropped, the samples stay too: a cursor without its samples would never ask for them again."""
    store.take_lines([sample(1)])
    with sqlite3.connect(store.home / "device.sqlite") as database:
        database.execute(
            f"CREATE TRIGGER t BEFORE DELETE ON facts WHEN old.name = '{CURSOR}' BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    database.close()

    with pytest.raises(sqlite3.IntegrityError):
        store.drop_synthetic()
    assert (store.cursor, store.synthetic(9)) == (1, [sample(1)])
    store.set_fact("version", "1")  # and the store goes on


# Outbox ---------------------------------------------------------------------------------------------------------------
def test_the_outbox_holds_one(store: Store) -> None:
    """A new parcel takes the place of the old one; delivery empties the outbox, also when it is empty."""
    store.post(Parcel("a", b"first"))
    store.post(Parcel("b", b"second"))
    assert store.pending() == Parcel("b", b"second")
    store.delivered()
    store.delivered()

    assert store.pending() is None


def test_what_a_result_lost_is_kept_until_there_is_another(opened: Callable[[], Store]) -> None:
    """Results of which nothing is lost, and deliveries, leave it; the next one that loses something replaces it."""
    store = opened()
    assert store.residual() is None
    for residual, kept in ((b"a", b"a"), (None, b"a"), (b"", b""), (b"c", b"c")):
        store.post(Parcel("t", b"body"), residual)
        store.delivered()
        assert store.residual() == kept
    assert opened().residual() == b"c"
    store.drop_residual()
    assert opened().residual() is None


def test_a_posted_result_ends_its_work(opened: Callable[[], Store]) -> None:
    """The result and the end of the work it came of are one transaction; other facts stay, and delivery changes none."""
    store = opened()
    store.set_fact(WORK, "training")
    store.set_fact("version", "3")
    store.post(Parcel("a", b"result"))
    again = opened()

    assert (again.fact(WORK), again.fact("version"), again.pending()) == (None, "3", Parcel("a", b"result"))
    again.set_fact(WORK, "more")
    again.delivered()
    assert again.fact(WORK) == "more"


def test_a_result_that_cannot_be_posted_leaves_its_work(store: Store) -> None:
    """Where the database takes no result, nothing is forgotten, and the store goes on."""
    store.set_fact(WORK, "training")
    nothing: Any = None  # NOT NULL: refused by SQLite in the middle of the transaction
    with pytest.raises(sqlite3.IntegrityError):
        store.post(Parcel("a", nothing))

    assert store.fact(WORK) == "training"
    assert store.pending() is None
    store.post(Parcel("a", b"result"))
    assert store.fact(WORK) is None


@pytest.mark.parametrize("body", [b"", b"\0" * 10, bytes(range(256)) * 8000])
def test_a_parcel_comes_back_byte_for_byte(store: Store, body: bytes) -> None:
    """Any bytes may be posted: none, zeros, two megabytes."""
    store.post(Parcel("type", body))

    assert store.pending() == Parcel("type", body)


POSTING = """
import itertools, sys
from pathlib import Path
from edge_sdk.store import Parcel, Store

store = Store(Path(sys.argv[1]))
for number in itertools.count(int(sys.argv[2])):
    body = str(number).encode() * 5000
    store.post(Parcel("number", body), b"lost of " + body)
    print(number, flush=True)
"""


def test_sigkill_loses_no_posted_parcel(tmp_path: Path) -> None:
    """Killed at any moment, the outbox holds the parcel whose `post` returned last or the one after, whole, and what it lost."""
    last = -1
    for seed in range(4):
        command = [sys.executable, "-c", POSTING, str(tmp_path), str(last + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(random.Random(seed).randint(1, 40)):
                last = int(process.stdout.readline())
            process.kill()
            last = max([last, *(int(line) for line in process.stdout if line.endswith("\n"))])
        store = Store(tmp_path)
        found, residual = store.pending(), store.residual()
        store.close()

        assert found is not None
        assert residual == b"lost of " + found.body
        assert found in [Parcel("number", str(number).encode() * 5000) for number in (last, last + 1)]
        last = int(found.body[: len(found.body) // 5000])
    with sqlite3.connect(tmp_path / "device.sqlite") as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()
