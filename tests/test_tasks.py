"""A task's bounds, and the arithmetic that turns readouts into probabilities."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import SettingsError
from edge_sdk.tasks import Head, Task, accuracy, sharpen, softmax
from tests import strategies

RIGHT: dict[str, Any] = {"labels": ("no", "yes"), "pattern": "{text} it was", "verbalizer": (("bad",), ("good",))}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": ("only",)}, "at least two different names"),
        ({"labels": ("same", "same")}, "at least two different names"),
        ({"labels": ()}, "at least two different names"),
        ({"pattern": "no place"}, "exactly once"),
        ({"pattern": "{text} and {text}"}, "exactly once"),
        ({"verbalizer": (("bad",),)}, "one non-empty list of words per label"),
        ({"verbalizer": (("bad",), ())}, "one non-empty list of words per label"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": math.nan}, "scale must be positive"),
        ({"max_tokens": 3}, "between 4 and 512"),
        ({"max_tokens": 513}, "between 4 and 512"),
    ],
)
def test_a_task_out_of_bounds_is_refused(change: dict[str, Any], sentence: str) -> None:
    """Each rule of a task is checked when it is made, and the sentence names the setting."""
    with pytest.raises(SettingsError, match=sentence):
        Task(**RIGHT | change)


@pytest.mark.parametrize("change", [{"max_tokens": 4}, {"max_tokens": 512}, {"verbalizer": (("bad", "poor"), ("good",))}])
def test_a_task_at_its_bounds_is_fine(change: dict[str, Any]) -> None:
    """The bounds themselves are allowed, and a class may have several descriptions."""
    task = Task(**RIGHT | change)

    assert msgspec.json.decode(msgspec.json.encode(task), type=Task) == task


def test_bounds_hold_for_decoded_tasks_too() -> None:
    """A task that comes as JSON passes the same checks."""
    body = msgspec.json.encode(Task(**RIGHT)).replace(b"{text}", b"")

    with pytest.raises(SettingsError, match="exactly once"):
        msgspec.json.decode(body, type=Task)


def test_scores_are_scaled_products() -> None:
    """A score is scale * readout . row: 10 * (1*3 + 2*4) = 110 and 10 * (1*5 - 2*6) = -70."""
    head = Head(np.array([[3, 4], [5, -6]], np.float32), scale=10.0)
    scores = head.scores(np.array([[1, 2]], np.float32))

    assert scores.tolist() == [[110.0, -70.0]]
    assert scores.dtype == np.float32


def test_no_readout_has_no_scores() -> None:
    """No text gives an empty table with a column for each class."""
    assert Head(np.ones((3, 2), np.float32), 1.0).scores(np.empty((0, 2), np.float32)).shape == (0, 3)


def test_softmax_of_known_scores() -> None:
    """Scores ln 1, ln 3 have probabilities 1/4 and 3/4; at T = 1/2 the ratio is squared: 1/10 and 9/10."""
    scores = np.array([[math.log(1), math.log(3)]], np.float32)

    np.testing.assert_allclose(softmax(scores), [[0.25, 0.75]], rtol=1e-6)
    np.testing.assert_allclose(softmax(scores, temperature=0.5), [[0.1, 0.9]], rtol=1e-6)


@given(strategies.score_tables(), st.floats(0.1, 10))
def test_softmax_gives_probabilities_in_the_order_of_scores(scores: strategies.Scores, temperature: float) -> None:
    """Rows sum to one, and the likeliest class is the one with the highest score at any temperature."""
    probabilities = softmax(scores, temperature)

    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    assert (probabilities.argmax(axis=1) == scores.argmax(axis=1)).all()


def test_softmax_does_not_overflow() -> None:
    """Scores as large as float32 holds still give probabilities."""
    assert softmax(np.array([[3e38, -3e38]], np.float32)).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("temperature", [1e-5, 5e-4, 1.0, 1e5])
def test_sharpening_at_any_temperature_is_finite(temperature: float) -> None:
    """Nothing underflows to 0 / 0, and a row that says nothing becomes uniform."""
    rows = sharpen(np.array([[0.5, 0.5], [0.9, 0.1], [1e-45, 0.0], [0.0, 0.0]], np.float32), temperature)

    np.testing.assert_allclose(rows.sum(1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(rows[[0, 3]], 0.5)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(1.0, [0.25, 0.75]), (0.5, [0.1, 0.9]), (0.25, [1 / 82, 81 / 82]), (2.0, [1 / (1 + 3**0.5), 1 / (1 + 3**-0.5)])],
)
def test_sharpening_of_known_probabilities(temperature: float, expected: list[float]) -> None:
    """The ratio 1 : 3 becomes 1 : 3^(1/T), in one row and in each row of a table; certainty stays what it is."""
    table = sharpen(np.array([[0.25, 0.75], [0.75, 0.25], [0.0, 1.0], [0.5, 0.5]], np.float32), temperature)

    np.testing.assert_allclose(sharpen(np.array([0.25, 0.75], np.float32), temperature), expected, rtol=1e-6)
    np.testing.assert_allclose(table, [expected, expected[::-1], [0.0, 1.0], [0.5, 0.5]], rtol=1e-6)
    assert table.dtype == np.float32


def test_soft_labels_that_do_not_sum_to_one_are_normalized() -> None:
    """Judges' probabilities may have lost a last bit, or more: 0.2 : 0.6 sharpens as 0.25 : 0.75 does."""
    np.testing.assert_allclose(sharpen(np.array([0.2, 0.6], np.float32), 0.5), [0.1, 0.9], rtol=1e-6)
    np.testing.assert_allclose(sharpen(np.array([0.2, 0.6], np.float32), 1.0), [0.25, 0.75], rtol=1e-6)


@given(strategies.score_tables(max_rows=8), st.floats(0.2, 5), st.floats(0.2, 5))
def test_sharpening_is_the_softmax_at_another_temperature(scores: strategies.Scores, first: float, then: float) -> None:
    """softmax(z / T)^(1/t), normalized, is softmax(z / (T t)): probabilities again, in the same order."""
    scores = scores / np.float32(4)  # or float32 has no digits left for what is unlikely
    sharpened = sharpen(softmax(scores, first), then)

    np.testing.assert_allclose(sharpened, softmax(scores, first * then), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sharpened.sum(axis=1), 1, rtol=1e-6)


def test_accuracy_is_the_share_of_hits() -> None:
    """Three of four rows have their highest score at the label: 0.75."""
    scores = np.array([[2, 1], [0, 5], [3, 1], [1, 0]], np.float32)

    assert accuracy(scores, [0, 1, 0, 1]) == 0.75
    assert accuracy(scores, [0, 1, 0, 0]) == 1.0
    assert accuracy(scores, [1, 0, 1, 1]) == 0.0
