"""Which unlabelled texts are taken: how many, which classes, in which order."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import SettingsError
from edge_sdk.softlabels import SoftLabels, choose, size
from tests import strategies
from tests.strategies import Scores


def margins(scores: Scores) -> Scores:
    """How far each row's best score is above its second."""
    ordered = np.sort(scores, axis=1)
    return ordered[:, -1] - ordered[:, -2]


# size -----------------------------------------------------------------------------------------------------------------
def test_the_set_grows_with_the_version_up_to_the_limit() -> None:
    """growth 10 of 100 texts at limit 0.35: 10 in version 0, then 20, 30, and 35 for ever."""
    settings = SoftLabels(growth=10, limit=0.35)

    assert [size(settings, version, 100) for version in range(5)] == [10, 20, 30, 35, 35]


def test_soft_labels_may_start_later() -> None:
    """With first 2, versions 0 and 1 have none, and growth counts from there."""
    settings = SoftLabels(first=2, growth=10, limit=0.35)

    assert [size(settings, version, 100) for version in range(7)] == [0, 0, 10, 20, 30, 35, 35]


@given(st.integers(0, 9), st.integers(1, 100), st.floats(0.01, 1), st.integers(0, 50), st.integers(0, 500))
def test_size_never_shrinks_nor_exceeds_the_limit(first: int, growth: int, limit: float, version: int, available: int) -> None:
    """A later version never takes less, no version takes more than its share, and nothing is taken of nothing."""
    settings = SoftLabels(first=first, growth=growth, limit=limit)
    now = size(settings, version, available)

    assert now <= size(settings, version + 1, available)
    assert 0 <= now <= limit * available
    assert size(settings, version, 0) == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"first": -1}, "first and soft.growth must not be negative"),
        ({"growth": -1}, "growth must not be negative"),
        ({"batch_size": 0}, "batch_size between"),
        ({"limit": 0.0}, "limit must be in"),
        ({"limit": 1.01}, "limit must be in"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"weight": -1.0}, "weight"),
    ],
)
def test_settings_out_of_bounds_are_refused(change: dict[str, Any], sentence: str) -> None:
    """Each bound is checked when the settings are made."""
    with pytest.raises(SettingsError, match=sentence):
        SoftLabels(**change)


# choose ---------------------------------------------------------------------------------------------------------------
def test_the_most_confident_of_each_class_are_taken() -> None:
    """Worked out by hand: four of six, three texts a class, so the two widest margins of each class, in order of index."""
    scores = np.array(
        [
            [5, 0],  # class 0, margin 5
            [1, 0],  # class 0, margin 1
            [3, 0],  # class 0, margin 3
            [0, 2],  # class 1, margin 2
            [0, 9],  # class 1, margin 9
            [0, 4],  # class 1, margin 4
        ],
        np.float32,
    )
    chosen = choose(scores, 4)

    assert chosen.indices.tolist() == [0, 2, 4, 5]
    assert chosen.scores.tolist() == [[5, 0], [3, 0], [0, 9], [0, 4]]


def test_confidence_is_the_margin_not_the_score() -> None:
    """A high score beside another high one is less confident than a low score far above the next."""
    scores = np.array([[100, 99, 0], [2, 0, 0]], np.float32)

    assert choose(scores, 1).indices.tolist() == [1]


def test_a_device_that_is_mostly_of_one_class_stays_so() -> None:
    """Three of six wanted, four texts of class 0 and two of class 1: half of each, so two of one and one of the other."""
    scores = np.array([[1, 0], [2, 0], [3, 0], [4, 0], [0, 1], [0, 2]], np.float32)

    assert choose(scores, 3).indices.tolist() == [2, 3, 5]


def test_a_share_is_rounded_up_for_every_class() -> None:
    """One of six wanted of two classes is one of each: no class that is there is left out by rounding."""
    scores = np.array([[1, 0], [2, 0], [3, 0], [4, 0], [5, 0], [0, 1]], np.float32)

    assert choose(scores, 1).indices.tolist() == [4, 5]


@given(strategies.score_tables())
def test_who_wants_more_than_there_is_gets_all(scores: Scores) -> None:
    """A count beyond the texts there are takes every text once."""
    assert choose(scores, len(scores) + 5).indices.tolist() == list(range(len(scores)))


@pytest.mark.parametrize("count", [0, -1])
def test_nothing_wanted_is_nothing_taken(count: int) -> None:
    """A count of zero gives an empty set with the right columns and types."""
    chosen = choose(np.ones((5, 3), np.float32), count)

    assert len(chosen) == 0
    assert chosen.scores.shape == (0, 3)
    assert chosen.indices.dtype == np.int64
    assert chosen.scores.dtype == np.float32


def test_no_texts_give_an_empty_set() -> None:
    """With nothing to choose from the set is empty, however much is wanted."""
    assert len(choose(np.empty((0, 2), np.float32), 10)) == 0


@given(strategies.score_tables(), st.integers(1, 60))
def test_every_class_gives_the_same_share(scores: Scores, count: int) -> None:
    """Of each class count / n of its texts are taken, rounded up; so the whole is at most n_classes - 1 over the count."""
    n, classes = scores.shape
    available = np.bincount(scores.argmax(axis=1), minlength=classes)
    chosen = choose(scores, count)
    taken = np.bincount(chosen.scores.argmax(axis=1), minlength=classes)

    assert taken.tolist() == [math.ceil(Fraction(min(count, n) * int(texts), n)) if n else 0 for texts in available]
    assert min(count, n) <= len(chosen) <= min(count + classes - 1, n)


@given(strategies.score_tables(), st.integers(1, 60))
def test_nobody_left_out_was_more_confident(scores: Scores, count: int) -> None:
    """Within a class every chosen text is more confident than every other."""
    chosen = choose(scores, count).indices
    left = np.setdiff1d(np.arange(len(scores)), chosen)
    predicted, margin = scores.argmax(axis=1), margins(scores)

    for label in range(scores.shape[1]):
        ours, others = chosen[predicted[chosen] == label], left[predicted[left] == label]
        assert len(ours) == 0 or len(others) == 0 or margin[ours].min() > margin[others].max()


@given(strategies.score_tables(), st.integers(1, 60))
def test_indices_are_distinct_ascending_and_belong_to_the_scores(scores: Scores, count: int) -> None:
    """Every text comes at most once, in order, with its own scores."""
    chosen = choose(scores, count)

    assert (np.diff(chosen.indices) > 0).all()
    assert (scores[chosen.indices] == chosen.scores).all()
    assert len(chosen) == len(chosen.indices)


@given(strategies.score_tables(), st.integers(1, 60), st.randoms(use_true_random=False))
def test_the_order_of_texts_does_not_matter(scores: Scores, count: int, random: Any) -> None:
    """Shuffled texts give the same choice, shuffled alike: the choice depends on scores, never on places."""
    order = np.array(random.sample(range(len(scores)), len(scores)), np.int64)
    chosen = choose(scores, count).indices
    shuffled = choose(scores[order], count).indices

    assert sorted(order[shuffled].tolist()) == chosen.tolist()
