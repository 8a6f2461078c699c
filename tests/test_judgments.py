"""A judgment in bytes: by hand, there and back, and what cannot be a judgment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import DataError
from edge_sdk.judgments import Form, decode, encode, width

SAID = np.array([[0.9, 0.1], [0.3, 0.7], [0.45, 0.55], [0.15, 0.85]])
WRITTEN = [0, 0, 1, 1]


def test_probabilities_by_hand() -> None:
    """256 levels a class, divided by their sum on the other side."""
    answer = encode(SAID, WRITTEN, "probabilities")

    assert answer.tolist() == [[230, 26], [76, 178], [115, 140], [38, 217]]
    np.testing.assert_allclose(decode(answer, WRITTEN, 2, "probabilities")[1], [76 / 254, 178 / 254])


def test_agreement_by_hand() -> None:
    """Agrees and is sure, disagrees and is not, agrees and is not, agrees and is sure."""
    answer = encode(SAID, WRITTEN, "agree")

    assert answer.tolist() == [[3], [0], [1], [3]]
    np.testing.assert_allclose(decode(answer, WRITTEN, 2, "agree"), [[0.9, 0.1], [0.35, 0.65], [0.35, 0.65], [0.1, 0.9]])


def test_disagreement_among_many_classes_names_none() -> None:
    """Sure that it is not the first of four: a third of a tenth for it, the others share alike."""
    answer = encode(np.array([[0.05, 0.9, 0.05, 0.0]]), [0], "agree")

    np.testing.assert_allclose(decode(answer, [0], 4, "agree"), [[0.1 / 3, *[(1 - 0.1 / 3) / 3] * 3]])


@given(st.integers(2, 5), st.integers(0, 20), st.integers(0, 1000), st.sampled_from(["probabilities", "agree"]))
def test_there_and_back(n_classes: int, count: int, seed: int, form: Form) -> None:
    """What comes out is a distribution; 8 bits keep it to a level, and agreement keeps whether it agreed."""
    rng = np.random.default_rng(seed)
    said = rng.dirichlet([1.0] * n_classes, count)
    written = rng.integers(0, n_classes, count).tolist()
    answer = encode(said, written, form)
    found = decode(answer, written, n_classes, form)

    assert answer.shape == (count, width(form, n_classes))
    np.testing.assert_allclose(found.sum(1), np.ones(count))
    if form == "probabilities":
        np.testing.assert_allclose(found, said, atol=(n_classes + 1) / 500)
    else:
        agreed = said.argmax(1) == written
        assert ((found.argmax(1) == written) == agreed).all()


def test_no_answer_is_zeros() -> None:
    """A row of zero bytes is a text that a device left out."""
    assert decode(np.zeros((1, 2), np.uint8), [0], 2, "probabilities").tolist() == [[0, 0]]


@pytest.mark.parametrize(("answer", "form"), [([[1, 2, 3]], "probabilities"), ([[1], [1]], "agree"), ([[4]], "agree")])
def test_what_is_no_judgment(answer: list[list[int]], form: Form) -> None:
    """Another number of classes or texts, or bits that mean nothing."""
    with pytest.raises(DataError):
        decode(np.array(answer, np.uint8), [0], 2, form)
