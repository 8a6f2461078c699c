"""The cache of hidden states: computed once, rounded once, and given up rather than trusted."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.adapters import Array
from edge_sdk.errors import DataError
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


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def scramble(path: Path) -> None:
    """Noise in the middle, where texts are; the first pages, which are read on opening, are whole."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 3)
        file.write(np.random.default_rng(0).bytes(size // 3))


def scramble_the_end(path: Path) -> None:
    """Noise where the last texts are, so that many are found before."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size - (5 << 12))
        file.write(np.random.default_rng(0).bytes(5 << 12))


MANY: list[Ids] = [[i] * 200 for i in range(1, 301)]


@pytest.mark.parametrize("spoil", [truncate, scramble, scramble_the_end])
def test_a_file_spoiled_on_disk_is_filled_again(cache: Cache, spoil: Callable[[Path], None]) -> None:
    """Whether damage shows on opening or on reading, states are right, and one life later nothing is computed any more."""
    states = cache.open()
    fill(states, MANY)
    states.close()
    spoil(cache.path)
    states = cache.open()
    fill(states, MANY)
    assert right(states.read(MANY), MANY)
    states.close()
    computed = len(cache.trunk.read)

    states = cache.open()
    assert states.missing(MANY) == []
    assert right(states.read(MANY), MANY)
    assert len(cache.trunk.read) == computed
    assert len(cache.said) == 1
    assert "damaged" in cache.said[0]


def test_damage_found_in_training_is_not_there_in_the_next_life(cache: Cache) -> None:
    """Texts read without a fill are right, and the next life fills a new file, once."""
    states = cache.open()
    fill(states, MANY)
    states.close()
    scramble(cache.path)
    states = cache.open()
    assert right(states.read(MANY), MANY)
    states.close()
    for _ in range(2):
        before, states = len(cache.trunk.read), cache.open()
        fill(states, MANY)
        states.close()

    assert len(cache.trunk.read) == before
    assert len(cache.said) == 1


def mislead(states: HiddenStates) -> None:
    """Lets the index of an open file lead to a page of texts, which SQLite finds on the next use."""
    assert states._db is not None
    states._db.execute("PRAGMA writable_schema = ON")
    states._db.execute("UPDATE sqlite_schema SET rootpage = 5 WHERE name LIKE 'sqlite_autoindex%'")
    states._db.execute("PRAGMA writable_schema = RESET")


def test_a_second_damage_in_a_life_ends_the_cache(cache: Cache) -> None:
    """A disk that spoils the new file too is not filled over and over; states stay right."""
    states = cache.open()
    for _ in range(2):
        fill(states, MANY)
        mislead(states)
        assert right(states.read(MANY), MANY)

    assert states.missing(MANY) == []
    assert len(cache.said) == 2
    assert "computed every time" in cache.said[1]


def test_damage_found_while_writing_loses_no_text_of_the_job(cache: Cache) -> None:
    """When SQLite finds the file damaged on a write, that chunk and all earlier ones come into a new file."""
    states = cache.open()
    fill(states, MANY[:150])
    left = states.missing(MANY)
    mislead(states)
    assert states.advance(left, float("inf")) == []
    states.close()
    computed = len(cache.trunk.read)

    assert right(cache.open().read(MANY), MANY)
    assert len(cache.trunk.read) == computed
    assert len(cache.said) == 1
    assert "damaged" in cache.said[0]


CHANGES = ["UPDATE states SET scale = 2", "UPDATE states SET scale = 'x'", "UPDATE states SET text = ?"]


@pytest.mark.parametrize("change", CHANGES)
def test_all_of_a_text_is_under_its_checksum(cache: Cache, change: str) -> None:
    """A changed scale, one that is no number, and states that stand under another text's name are not served."""
    pair = [SEQUENCES[0], SEQUENCES[5]]  # of one length
    fill(cache.open(), pair[:1])
    with sqlite3.connect(cache.path) as db:
        db.execute(change, (hidden._name(pair[1]),) * change.count("?"))
    states = cache.open()

    assert right(states.read(pair), pair)
    assert len(states.missing(pair)) == 2


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
    assert "takes no more" in cache.said[0]


def test_a_limit_is_kept(cache: Cache) -> None:
    """The file stays below its limit; what does not fit is computed every time."""
    states = cache.open(limit=60_000)
    many: list[Ids] = [[i] * 200 for i in range(300)]
    fill(states, many)

    assert right(states.read(many), many)
    assert states.size() < 200_000  # SQLite's log is emptied when the file is closed
    assert any("is full at" in line for line in cache.said)


@pytest.mark.parametrize("next_life", [True, False])
def test_texts_that_are_gone_make_room(cache: Cache, next_life: bool) -> None:
    """At the limit the texts of an earlier job go, in the same life or the next; those of the present one stay."""
    states = cache.open(limit=600_000)
    fill(states, MANY)
    job = [*MANY[:50], *([i] * 200 for i in range(1001, 1251))]
    if next_life:
        states.close()
        states = cache.open(limit=600_000)
    fill(states, job)
    states.close()
    assert cache.path.stat().st_size <= 600_000
    computed = len(cache.trunk.read)

    assert computed == len(MANY) + 250
    assert right(cache.open(limit=600_000).read(job), job)
    assert len(cache.trunk.read) == computed
    assert cache.said == []


def test_a_job_after_one_that_was_too_large_is_kept(cache: Cache) -> None:
    """A limit that a job reached does not hold for the next one in the same life."""
    states = cache.open(limit=100_000)
    fill(states, MANY)
    assert states.missing(MANY) == []
    fill(states, job := [[7] * 100, [8] * 100])
    computed = len(cache.trunk.read)

    assert right(states.read(job), job)
    assert len(cache.trunk.read) == computed
    assert len(cache.said) == 1


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    """Where the file cannot be opened at all, states are computed, and the reason is said."""
    (tmp_path / "hidden.sqlite").mkdir()
    cache = Cache(tmp_path / "hidden.sqlite")
    states = cache.open()

    assert right(states.read(SEQUENCES))
    assert states.missing(SEQUENCES) == []
    assert len(cache.said) == 1
    assert "computed every time" in cache.said[0]


def test_without_a_path_nothing_is_kept() -> None:
    """For a simulation: everything is computed, nothing is missing."""
    trunk = Trunk()
    states = HiddenStates(trunk, "k", None)

    assert states.missing(SEQUENCES) == []
    assert right(states.read(SEQUENCES))


def test_long_texts_are_read_one_by_one(tmp_path: Path) -> None:
    """A step ends after about 512 tokens, padding counted, and a longer text stands alone, in filling and in reading."""
    sizes: list[tuple[int, int]] = []

    def compute(sequences: Sequence[Ids]) -> list[Array]:
        sizes.append((len(sequences), max(map(len, sequences))))
        return Trunk()(sequences)

    texts: list[Ids] = [[i + 1] * length for i, length in enumerate([20] * 9 + [200] * 4 + [512] * 3 + [700])]
    states = HiddenStates(compute, "k", tmp_path / "hidden.sqlite")
    left = states.missing(texts)
    steps = 0
    while left:
        left = states.advance(left, 0.0)
        steps += 1
    assert steps == len(sizes)
    assert right(HiddenStates(compute, "k", None).read(texts), texts)

    assert all(count == 1 or count * longest <= 512 for count, longest in sizes)
    assert sum(count for count, _ in sizes) == 2 * len(texts)
    assert len(sizes) < 2 * len(texts)


class Short(Trunk):
    """Has memory for one text at a time, and for none of more than `tokens` tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.refused = tokens, 0

    def __call__(self, sequences: Sequence[Ids]) -> list[Array]:
        if len(sequences) > 1 or len(sequences[0]) > self.tokens:
            self.refused += 1
            raise MemoryError
        return super().__call__(sequences)


def test_where_memory_is_short_texts_are_read_in_halves(cache: Cache) -> None:
    """Down to one text, which stays the measure: what was refused is not tried at every chunk."""
    cache.trunk = short = Short(99)
    states = cache.open()
    fill(states)

    assert right(states.read(SEQUENCES))
    assert len(short.read) == len(SEQUENCES)
    assert 0 < short.refused < 8
    assert right(HiddenStates(short, "k", None).read(SEQUENCES))


def test_a_text_too_long_for_the_memory_is_an_error_in_one_line(cache: Cache) -> None:
    """It says what to do; shorter texts are kept."""
    cache.trunk = Short(4)
    states = cache.open()
    with pytest.raises(DataError, match=r"a text of 5 tokens is too long for the memory .* lower task\.max_tokens") as raised:
        fill(states)

    assert "\n" not in str(raised.value)
    assert {len(ids) for ids in states.missing(SEQUENCES)} == {5}


@settings(max_examples=50)
@given(st.floats(-30, 30), st.integers(1, 5), st.integers(0, 2**31))
def test_rounding_keeps_three_digits_at_any_size(power: float, tokens: int, seed: int) -> None:
    """float16 with a power of two: huge first tokens stay finite, and every value is right to 1e-3 of the largest."""
    states = (np.random.default_rng(seed).normal(0, 1, (tokens, 8)) * 2.0**power).astype(np.float32)
    back = hidden._unpack(*hidden._pack(states), tokens)

    assert np.abs(back - states).max() <= max(1e-3 * np.abs(states).max(), 1e-7)
