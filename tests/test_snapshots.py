"""A snapshot is a shortcut: from any of them, from a damaged one and from none the same state comes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from edge_server import coordinator, snapshots, storage
from edge_server.coordinator import Event, State
from edge_server.storage import EventLog
from tests import strategies
from tests.test_coordinator import cohort_lives, learn, mask, moves, run, sequences

lives: st.SearchStrategy[Sequence[Event]] = st.one_of(
    sequences.map(lambda sequence: run(list(sequence)).events),
    st.lists(moves, max_size=60).map(lambda sequence: learn(list(sequence)).events),
    cohort_lives().map(lambda sequence: mask(sequence).events),
)


def states(events: Sequence[Event]) -> list[State]:
    """After no event, after one, ..., after all."""
    found = [State()]
    for event in events:
        found.append(coordinator.apply(found[-1], event))
    return found


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    with closing(EventLog(storage.sqlite(tmp_path / "events.sqlite"))) as log:
        yield log


def append(log: EventLog, events: Sequence[Event]) -> None:
    for event in events:
        log.append(msgspec.json.encode(event))


ENROLLED = [coordinator.Enrolled(f"d{i}", "name") for i in range(9)]
NINE = functools.reduce(coordinator.apply, ENROLLED, State())


@strategies.fuzzing
@given(lives)
def test_every_state_survives_the_disk(events: Sequence[Event]) -> None:
    """Devices, receipts, sheets, cohorts and keys: the same values, of the same types."""
    for state in states(events):
        assert snapshots.decode(snapshots.encode(state)) == state


@strategies.fuzzing
@given(lives, st.data())
def test_from_any_snapshot_the_same_state_comes(events: Sequence[Event], data: st.DataObject) -> None:
    """Replaying what came later is replaying everything."""
    *_, final = all_states = states(events)
    at = data.draw(st.integers(0, len(events)))
    with closing(EventLog(sa.URL.create("sqlite"))) as log:  # in memory: no example waits for a disk
        append(log, events[:at])
        snapshots.take(log, all_states[at])
        append(log, events[at:])

        assert snapshots.replay(log, every=1000) == final


def test_what_a_snapshot_holds_is_not_replayed(log: EventLog) -> None:
    """A state that no events would make proves where a start begins."""
    append(log, ENROLLED)
    snapshots.take(log, replace(NINE, version=7))
    append(log, [coordinator.Enrolled("d9", "name")])

    assert (found := snapshots.replay(log, every=1000)).version == 7
    assert len(found.devices) == 10


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE snapshots SET body = :body",
        "UPDATE snapshots SET body = :body, sha256 = :sha256",
        "UPDATE snapshots SET program = 'older'",
        "DELETE FROM snapshots",
    ],
)
@pytest.mark.parametrize("body", [b"", b"{}x", b'{"version":"seven"}', b'{"cohort":{"type":"new"}}'])
def test_a_snapshot_that_is_none_costs_only_time(log: EventLog, tmp_path: Path, change: str, body: bytes) -> None:
    """Damaged, of another program, or of bytes that no state has: everything is replayed."""
    append(log, ENROLLED)
    snapshots.take(log, replace(NINE, version=7))
    with sa.create_engine(storage.sqlite(tmp_path / "events.sqlite")).begin() as disk:
        values = {"body": body, "sha256": hashlib.sha256(body).hexdigest()}
        disk.execute(sa.text(change), {name: value for name, value in values.items() if f":{name}" in change})

    assert snapshots.replay(log, every=1000) == NINE


def test_a_long_replay_is_the_last_of_its_kind(log: EventLog) -> None:
    """A start that had to read more than it should keeps what came of it."""
    append(log, ENROLLED)
    snapshots.replay(log, every=9)
    assert list(log.snapshots(snapshots.PROGRAM)) == []
    snapshots.replay(log, every=8)

    [(after, body)] = log.snapshots(snapshots.PROGRAM)
    assert (after, snapshots.decode(body)) == (9, NINE)
