"""The cache of hidden states: computed once, rounded once, and given up rather than trusted."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.adapters import Array
from edge_sdk.tokens import Ids
from edge_sdk.training import hidden
from edge_sdk.training.hidden import HiddenStates
from tests import strategies  # noqa: F401  # its hypothesis profile

SEQUENCES: list[Ids] = [[i + 1] * (1 + i % 5) for i in range(40)]


class Trunk:
    """Counts what it computes; states that depend on every token and position."""

    def __init__(self) -> None:
        self.read: list[Ids] = []

    def __call__(self, sequences: Sequence[Ids]) -> list[Array]:
        self.read.extend(sequences)
        return [np.outer(np.arange(1, len(ids) + 1), np.array(ids[:1] * 3) / 7).astype(np.float32) for ids in sequences]


class Cache:
    def __init__(self, path: Path) -> None:
        self.path, self.trunk, self.said = path, Trunk(), list[str]()

    def open(self, key: str = "k", limit: int = 1 << 30) -> HiddenStates:
        return HiddenStates(self.trunk, key, self.path, limit, self.said.append)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "hidden.sqlite")


def fill(states: HiddenStates, sequences: Sequence[Ids] = SEQUENCES) -> None:
    assert states.advance(states.missing(sequences), float("inf")) == []


def right(found: list[Array], sequences: Sequence[Ids] = SEQUENCES) -> bool:
    return all(np.allclose(a, b, rtol=1e-3) for a, b in zip(found, Trunk()(sequences), strict=True))


def test_a_text_is_computed_once(cache: Cache) -> None:
    """Filling computes each text once, reading and opening again compute nothing."""
    states = cache.open()
    fill(states, SEQUENCES + SEQUENCES)
    assert right(states.read(SEQUENCES))
    states.close()

    assert right(cache.open().read(SEQUENCES))
    assert len(cache.trunk.read) == len(SEQUENCES)


def test_what_is_not_there_is_computed_and_rounded_alike(cache: Cache) -> None:
    """A read without a fill gives the same numbers as one from disk."""
    states = cache.open()
    fresh = states.read(SEQUENCES)
    fill(states)

    assert all((a == b).all() for a, b in zip(fresh, states.read(SEQUENCES), strict=True))


def test_filling_after_a_power_cut_makes_the_same_chunks(tmp_path: Path) -> None:
    """Chunks come shortest first and are there whole or not at all, so a later fill computes what an undisturbed one would."""
    whole, cut = Cache(tmp_path / "a"), Cache(tmp_path / "b")
    fill(whole.open())
    first = cut.open()
    first.advance(first.missing(SEQUENCES), 0.0)
    first.close()
    fill(cut.open())

    assert cut.trunk.read == whole.trunk.read


@pytest.mark.parametrize("key", ["another bundle", "k 21", ""])
def test_another_key_is_another_cache(cache: Cache, key: str) -> None:
    """A changed bundle, split or lower adapter empties the file, in one line."""
    fill(cache.open())
    states = cache.open(key)

    assert len(states.missing(SEQUENCES)) == len(SEQUENCES)
    assert len(cache.said) == 1
    assert "changed" in cache.said[0]


def test_a_damaged_text_is_computed_again(cache: Cache) -> None:
    """A flipped bit in one text's states is found by its checksum."""
    fill(cache.open())
    with sqlite3.connect(cache.path) as db:
        db.execute("UPDATE states SET body = zeroblob(length(body)) WHERE rowid % 3 = 0")
    states = cache.open()

    assert 0 < len(states.missing(SEQUENCES)) < len(SEQUENCES)
    assert right(states.read(SEQUENCES))


@pytest.mark.parametrize("body", [b"", b"no database at all" * 500])
def test_a_damaged_file_is_begun_anew(cache: Cache, body: bytes) -> None:
    """What is no database is deleted and made anew; nothing is lost but time."""
    cache.path.write_bytes(body)
    states = cache.open()
    fill(states)

    assert right(states.read(SEQUENCES))
    assert states.missing(SEQUENCES) == []
    assert [line for line in cache.said if "damaged" in line] == cache.said


def test_a_full_disk_costs_time_only(cache: Cache) -> None:
    """When SQLite says the disk is full, it is said once, and the rest is computed every time."""
    states = cache.open()
    assert states._db is not None
    states._db.execute("PRAGMA max_page_count = 12")  # what SQLite says then is what it says on a full disk
    many: list[Ids] = [[i] * 200 for i in range(100)]
    fill(states, many)

    assert right(states.read(many), many)
    assert states.missing(many) == []
    assert len(cache.trunk.read) > len(many)
    assert len(cache.said) == 1
    assert "full" in cache.said[0]


def test_a_limit_is_kept(cache: Cache) -> None:
    """The file stays below its limit; what does not fit is computed every time."""
    states = cache.open(limit=60_000)
    many: list[Ids] = [[i] * 200 for i in range(300)]
    fill(states, many)

    assert right(states.read(many), many)
    assert states.size() < 200_000  # SQLite's log is emptied when the file is closed
    assert any("is full at" in line for line in cache.said)


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    """Where the file cannot be opened at all, states are computed, and the reason is said."""
    (tmp_path / "hidden.sqlite").mkdir()
    cache = Cache(tmp_path / "hidden.sqlite")
    states = cache.open()

    assert right(states.read(SEQUENCES))
    assert states.missing(SEQUENCES) == []
    assert "computed every time" in cache.said[-1]


def test_without_a_path_nothing_is_kept() -> None:
    """For a simulation: everything is computed, nothing is missing."""
    trunk = Trunk()
    states = HiddenStates(trunk, "k", None)

    assert states.missing(SEQUENCES) == []
    assert right(states.read(SEQUENCES))


@settings(max_examples=50)
@given(st.floats(-30, 30), st.integers(1, 5), st.integers(0, 2**31))
def test_rounding_keeps_three_digits_at_any_size(power: float, tokens: int, seed: int) -> None:
    """float16 with a power of two: huge first tokens stay finite, and every value is right to 1e-3 of the largest."""
    states = (np.random.default_rng(seed).normal(0, 1, (tokens, 8)) * 2.0**power).astype(np.float32)
    back = hidden._unpack(*hidden._pack(states), tokens)

    assert np.abs(back - states).max() <= max(1e-3 * np.abs(states).max(), 1e-7)
