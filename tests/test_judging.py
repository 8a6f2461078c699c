"""Combining judgments: hand-worked values, symmetry, and liars who get no say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import DataError
from edge_server.knowledge.judging import Ballot, Verdict, combine, guest

TEXTS = 400
TRUTH = np.random.default_rng(0).integers(0, 2, TEXTS)
WRITTEN = [0] * TEXTS


def judge(accuracy: float, seed: int) -> Ballot:
    """Right as often as `accuracy` says, and 90 % sure each time."""
    right = np.random.default_rng(seed).random(TEXTS) < accuracy
    said = np.where(right, TRUTH, 1 - TRUTH)
    return Ballot(np.where(np.arange(2)[None] == said[:, None], 0.9, 0.1))


def right(verdict: Verdict) -> float:
    return float((verdict.soft.argmax(1) == TRUTH).mean())


LIARS = {
    "random": Ballot(np.random.default_rng(9).dirichlet([1, 1], TEXTS)),
    "inverted": Ballot(judge(0.85, 7).probabilities[:, ::-1]),
    "constant": Ballot(np.tile([0.0, 1.0], (TEXTS, 1))),
}


def test_one_judge_is_taken_at_its_word() -> None:
    """With nobody to compare it with, its probabilities are the verdict."""
    verdict = combine([Ballot(np.array([[0.8, 0.2], [0.3, 0.7]]))], [0, 1])

    np.testing.assert_allclose(verdict.soft, [[0.8, 0.2], [0.3, 0.7]])
    assert verdict.answers.tolist() == [1, 1]


def test_two_judges_weigh_by_the_log_odds_they_claim() -> None:
    """ln(.8 / .2) = 2 ln 2 against ln(2 / 1) = ln 2: two to one."""
    verdict = combine([Ballot(np.array([[1.0, 0.0]]), 0.8), Ballot(np.array([[0.0, 1.0]]), 2 / 3)], [0])

    assert verdict.weights == pytest.approx((2 * math.log(2), math.log(2)))
    np.testing.assert_allclose(verdict.soft, [[2 / 3, 1 / 3]])


@pytest.mark.parametrize("kind", LIARS)
def test_one_liar_in_four_gets_no_say(kind: str) -> None:
    """Its weight is a tenth of an honest judge's at most, and the verdict is as good as without it."""
    honest = [judge(0.8, seed) for seed in (1, 2, 3)]
    verdict = combine([*honest, LIARS[kind]], WRITTEN)

    assert verdict.weights[3] < 0.1 * min(verdict.weights[:3])
    assert right(verdict) >= right(combine(honest, WRITTEN)) - 0.01


def test_a_claim_lowers_a_weight_and_never_raises_it() -> None:
    """A judge that says it is perfect weighs no more than one that does not say; one that says it guesses weighs nothing."""
    honest = [judge(0.8, seed) for seed in (1, 2, 3)]
    boast, modest = Ballot(LIARS["random"].probabilities, 1.0), Ballot(judge(0.8, 4).probabilities, 0.5)

    assert combine([*honest, boast], WRITTEN).weights[3] < 0.1
    assert combine([*honest, modest], WRITTEN).weights[3] == 0


def test_a_judge_has_no_say_in_labels_it_does_not_know() -> None:
    """Texts written for a label a device has no data of are left to the others."""
    knows_first = Ballot(np.array([[0.9, 0.1], [0.9, 0.1]]), covers=frozenset([0]))
    knows_all = Ballot(np.array([[0.6, 0.4], [0.2, 0.8]]))
    verdict = combine([knows_first, knows_all], [0, 1])

    np.testing.assert_allclose(verdict.soft[1], [0.2, 0.8])
    assert verdict.answers.tolist() == [2, 1]


def test_a_text_nobody_answered_has_no_verdict() -> None:
    """Rows of zeros are no answers."""
    verdict = combine([Ballot(np.array([[0.0, 0.0], [1.0, 0.0]]))], [0, 0])

    assert verdict.soft.tolist() == [[0, 0], [1, 0]]
    assert verdict.answers.tolist() == [0, 1]


@given(st.permutations(range(4)), st.integers(0, 100))
def test_the_order_of_judges_does_not_matter(order: list[int], seed: int) -> None:
    """Permuting the ballots permutes the weights and leaves the verdict."""
    ballots = [judge(0.6 + 0.1 * k, seed + k) for k in range(4)]
    straight, mixed = combine(ballots, WRITTEN), combine([ballots[k] for k in order], WRITTEN)

    np.testing.assert_allclose(mixed.soft, straight.soft, atol=1e-9)
    np.testing.assert_allclose(mixed.weights, [straight.weights[k] for k in order], atol=1e-9)


@given(st.integers(1, 5), st.integers(2, 4), st.integers(0, 1000))
def test_verdicts_are_probabilities(judges: int, classes: int, seed: int) -> None:
    """Whatever was answered, every row is a distribution or zero, and weights are finite."""
    rng = np.random.default_rng(seed)
    ballots = [Ballot(rng.integers(0, 256, (7, classes)) / 255, float(rng.random())) for _ in range(judges)]
    verdict = combine(ballots, rng.integers(0, classes, 7).tolist())

    sums = verdict.soft.sum(1)
    assert ((np.abs(sums - 1) < 1e-9) | (sums == 0)).all()
    assert (verdict.soft >= 0).all()
    assert np.isfinite(verdict.weights).all()


def test_nobody_and_other_shapes_are_refused() -> None:
    """No judge, or a judge that answered about other texts."""
    with pytest.raises(DataError, match="nobody"):
        combine([], [])
    with pytest.raises(DataError, match="shapes"):
        combine([Ballot(np.ones((3, 2)))], [0, 1])


def test_a_guest_answers_only_with_the_others_and_claims_no_more() -> None:
    """Texts for a class that no device knows stay unjudged, and the guest's claim is that of the best device."""
    sure = np.array([[0.9, 0.1], [0.1, 0.9]])
    devices = [Ballot(sure, 0.8, frozenset({0})), Ballot(sure, 0.7, frozenset({0}))]
    made = guest(np.array([[0.6, 0.4], [0.2, 0.8]]), devices, [0, 1])

    assert made.claimed == 0.8
    assert made.probabilities.tolist() == [[0.6, 0.4], [0.0, 0.0]]
    assert combine([*devices, made], [0, 1]).answers.tolist() == [3, 0]
