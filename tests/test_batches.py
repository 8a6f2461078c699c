"""The order in which examples meet training steps."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import SettingsError
from edge_sdk.training.batches import Training, epochs
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
