"""The order in which examples meet training steps."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import DataError, SettingsError
from edge_sdk.training.batches import Answer, Classes, Guess, Job, Label, Row, Source, Target, TopTokens, Training, epochs
from tests import strategies  # noqa: F401  # its hypothesis profile


def batches(count: int, batch_size: int, steps: int, seed: int = 0) -> list[list[int]]:
    return [batch.tolist() for batch in epochs([1] * count, batch_size, steps, np.random.default_rng(seed))]


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 30), st.integers(0, 2**32))
def test_every_index_comes_once_before_any_comes_twice(count: int, batch_size: int, steps: int, seed: int) -> None:
    """At any moment no index has come more than once oftener than another, and a batch never holds one twice."""
    seen: Counter[int] = Counter(dict.fromkeys(range(count), 0))
    for batch in batches(count, batch_size, steps, seed):
        assert len(set(batch)) == len(batch)
        seen.update(batch)
        assert max(seen.values()) - min(seen.values()) <= 1

    assert set(seen) == set(range(count))


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 30))
def test_batches_are_full_but_at_the_end_of_a_pass(count: int, batch_size: int, steps: int) -> None:
    """A pass is cut into full batches and one rest; there are exactly `steps` batches."""
    rest = [count % batch_size] if count % batch_size else []
    one_pass = [batch_size] * (count // batch_size) + rest
    sizes = [len(batch) for batch in batches(count, batch_size, steps)]

    assert sizes == (one_pass * math.ceil(steps / len(one_pass)))[:steps]


def test_sizes_of_a_known_case() -> None:
    """Seven indices in batches of three: 3, 3, 1, and again."""
    assert [len(batch) for batch in batches(7, 3, 5)] == [3, 3, 1, 3, 3]


def test_without_indices_every_batch_is_empty() -> None:
    """A device without soft texts still takes its steps, with empty batches."""
    assert batches(0, 4, 3) == [[], [], []]


@given(st.integers(2, 50), st.integers(0, 2**32))
def test_the_seed_decides_the_order(count: int, seed: int) -> None:
    """The same generator gives the same batches, so a device that lost power repeats the same work."""
    assert batches(count, 4, 20, seed) == batches(count, 4, 20, seed)


def test_another_seed_is_another_order() -> None:
    """The order is really shuffled: two seeds order a hundred indices differently, and neither as they came."""
    assert len({tuple(batches(100, 100, 1, seed)[0]) for seed in (0, 1)} | {tuple(range(100))}) == 3


def test_every_pass_is_shuffled_anew() -> None:
    """The second pass over the indices has an order of its own."""
    first, second = batches(100, 100, 2)

    assert first != second
    assert sorted(first) == sorted(second) == list(range(100))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 0}, "steps must be"),
        ({"batch_size": 0}, "batch_size and"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": 1.5}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"clip": 0.0}, "clip"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_settings_out_of_bounds_are_refused(change: dict[str, Any], sentence: str) -> None:
    """Each bound of the training settings is checked when they are made."""
    with pytest.raises(SettingsError, match=sentence):
        Training(**change)


# Buckets --------------------------------------------------------------------------------------------------------------
def bucketed(lengths: list[int], batch_size: int, steps: int, bucket: int, seed: int = 0) -> list[list[int]]:
    return [batch.tolist() for batch in epochs(lengths, batch_size, steps, np.random.default_rng(seed), bucket)]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=40), st.integers(1, 9), st.integers(2, 8), st.integers(0, 2**32))
def test_in_buckets_too_every_index_comes_once_before_any_comes_twice(
    lengths: list[int], batch_size: int, bucket: int, seed: int
) -> None:
    """Three passes, each a permutation in batches of distinct indices: sorting by length leaves nobody out."""
    one_pass = math.ceil(len(lengths) / batch_size)
    order = bucketed(lengths, batch_size, 3 * one_pass, bucket, seed)

    for at in range(0, len(order), one_pass):
        together = [i for batch in order[at : at + one_pass] for i in batch]
        assert sorted(together) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for batch in order)


def test_a_bucket_of_everything_holds_neighbours_in_length() -> None:
    """With all of a pass in one bucket, the batches are the texts sorted by length and cut, in no order of length."""
    lengths = [int(n) for n in np.random.default_rng(5).permutation(64)]
    order = bucketed(lengths, 4, 16, bucket=16)
    found = [sorted(lengths[i] for i in batch) for batch in order]

    assert sorted(found) == [list(range(n, n + 4)) for n in range(0, 64, 4)]
    assert found != sorted(found)


def test_a_larger_bucket_is_less_padding_and_none_is_the_old_order() -> None:
    """Padding falls from bucket to bucket, and a bucket of one batch is the plain order, length or no length."""
    lengths = [int(n) for n in np.random.default_rng(6).integers(1, 65, 128)]

    def padding(bucket: int) -> int:
        return sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in bucketed(lengths, 8, 16, bucket))

    assert padding(1) > 2 * padding(4) > 2 * padding(16)
    assert bucketed(lengths, 8, 16, 1) == batches(128, 8, 16)
    assert bucketed(lengths, 8, 16, 4) == bucketed(lengths, 8, 16, 4)


# Jobs -----------------------------------------------------------------------------------------------------------------
OTHER_TRAINING = {"steps": 5, "batch_size": 3, "learning_rate": 0.5, "clip": 2.0, "dropout": 0.2, "bucket": 4}


def guess(size: float = 1.0) -> Guess:
    return Guess(np.array([0.0, size], np.float32), 0.5)


def job(**changes: Any) -> Job:
    """Two sources; `changes` replace fields of the job."""
    rows = [Row([1, 2, 3], Label(0)), Row([4, 5], Label(1)), Row([6], Label(1))]
    fields: dict[str, Any] = {
        "start": {"a": np.zeros((2, 3), np.float32), "b": np.ones(2, np.float32)},
        "sources": [Source(rows, 2), Source([Row([7, 8], guess()), Row([9], guess())], 1, 0.5)],
        "training": Training(steps=4, batch_size=2),
        "seed": 3,
    }
    return Job(**{**fields, **changes})


def with_row(row: Row) -> Job:
    first, second = job().sources
    return job(sources=[replace(first, rows=[row, *first.rows[1:]]), second])


TOP = TopTokens(1, np.array([[5, 6], [7, 8], [9, 1]]), np.zeros((3, 2), np.float32))
TARGETS: list[Target] = [
    Label(0),
    Label(1),
    Answer(0),
    Answer(1),
    guess(),
    guess(2.0),
    Guess(np.array([0.0, 1.0], np.float32), 0.25),
    Classes(np.array([0.0, 1.0], np.float32)),
    TOP,
    replace(TOP, start=2),
    replace(TOP, ids=TOP.ids[::-1]),
    replace(TOP, logprobs=TOP.logprobs - 1),
    TopTokens(1, TOP.ids.reshape(2, 3), TOP.logprobs.reshape(2, 3)),
]


def test_a_jobs_key_changes_with_everything_it_depends_on() -> None:
    """Each setting, each array, each row and each number of a target makes another name; the same job has the same name."""
    first, second = job().sources
    start = job().start
    moved = np.zeros((2, 3), np.float32)
    moved[1, 2] = 1e-30
    others = [
        *(job(training=msgspec.structs.replace(job().training, **{name: value})) for name, value in OTHER_TRAINING.items()),
        job(seed=4),
        job(start={**start, "a": moved}),
        job(start={**start, "a": np.zeros((3, 2), np.float32)}),
        job(start={"a": start["a"], "c": start["b"]}),
        job(start={"a": start["a"]}),
        job(sources=[first]),
        job(sources=[second, first]),
        job(sources=[replace(first, batch_size=3), second]),
        job(sources=[replace(first, weight=0.9), second]),
        job(sources=[replace(first, rows=first.rows[::-1]), second]),
        job(sources=[replace(first, rows=first.rows[1:]), second]),
        job(sources=[first, replace(second, rows=[])]),
        with_row(Row([1, 2], Label(0))),
        with_row(Row([1, 2, 4], Label(0))),
        *(with_row(Row([1, 2, 3], target)) for target in TARGETS[1:]),
    ]

    assert OTHER_TRAINING.keys() == set(Training.__struct_fields__)
    assert job().key == with_row(Row([1, 2, 3], TARGETS[0])).key
    assert len({job().key, *(other.key for other in others)}) == len(others) + 1


@pytest.mark.parametrize("sources", [[], [Source([], 4)], [Source([], 4), Source([], 1, 0.5)]])
def test_a_job_without_rows_is_refused(sources: list[Source]) -> None:
    """Nothing to learn from is an error that says what to do, however many empty sources there are."""
    with pytest.raises(DataError, match="edge-agent add"):
        job(sources=sources)


def test_weights_of_a_step_add_up_to_those_of_its_sources() -> None:
    """In every step a source's rows share its weight evenly, in a small rest batch too; an empty source has no part."""
    first, second = job().sources
    sources = [first, replace(second, weight=0.5), Source([], 4, 9.0)]
    steps = list(job(sources=sources).steps())
    sizes = [[sum(isinstance(row.target, kind) for row, _ in rows) for kind in (Label, Guess)] for rows in steps]

    assert sizes == [[2, 1], [1, 1], [2, 1], [1, 1]]  # three labels in batches of two: two and one
    for rows, (labels, _) in zip(steps, sizes, strict=True):
        assert [weight for row, weight in rows if isinstance(row.target, Label)] == [1.0 / labels] * labels
        assert [weight for row, weight in rows if isinstance(row.target, Guess)] == [0.5]


def test_a_step_may_consist_of_guesses_alone() -> None:
    """A device whose labels are of another source's kind still trains: rows of one source suffice."""
    second = job().sources[1]

    assert [len(rows) for rows in job(sources=[Source([], 2), second]).steps()] == [1, 1, 1, 1]
