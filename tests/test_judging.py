"""Combining judgments: hand-worked values, symmetry, and liars who get no say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import DataError
from edge_sdk.judgments import Form, decode, encode
from edge_server.knowledge.judging import Ballot, Floats, Verdict, combine, guest

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
    "inverted, and sure": Ballot(np.rint(judge(0.85, 7).probabilities[:, ::-1])),
    "constant": Ballot(np.tile([0.0, 1.0], (TEXTS, 1))),
}


def test_one_judge_is_taken_at_its_word() -> None:
    """With nobody to compare it with, its probabilities are the verdict."""
    verdict = combine([Ballot(np.array([[0.8, 0.2], [0.3, 0.7]]))], [0, 1])

    np.testing.assert_allclose(verdict.soft, [[0.8, 0.2], [0.3, 0.7]])
    assert verdict.answers.tolist() == [1, 1]


@pytest.mark.parametrize(("claim", "soft"), [(0.8, [0.6, 0.4]), (0.98, [0.6, 0.4]), (0.5, [0.2, 0.8])])
def test_of_two_judges_the_bolder_claim_does_not_win(claim: float, soft: list[float]) -> None:
    """They weigh alike, unless one says itself that it guesses; a third who says nothing changes nothing."""
    ballots = [Ballot(np.array([[1.0, 0.0]]), claim), Ballot(np.array([[0.2, 0.8]]), 2 / 3)]

    np.testing.assert_allclose(combine(ballots, [0]).soft[0], soft)
    np.testing.assert_allclose(combine([*ballots, Ballot(np.zeros((1, 2)))], [0]).soft[0], soft)


@pytest.mark.parametrize("kind", LIARS)
def test_one_liar_in_four_gets_no_say(kind: str) -> None:
    """Its weight is a tenth of an honest judge's at most, and the verdict is as good as without it."""
    honest = [judge(0.8, seed) for seed in (1, 2, 3)]
    verdict = combine([*honest, LIARS[kind]], WRITTEN)

    assert verdict.weights[3] < 0.1 * min(verdict.weights[:3])
    assert right(verdict) >= right(combine(honest, WRITTEN)) - 0.01


Lie = Callable[[Floats, Floats, np.random.Generator], Floats]
LIES: dict[str, Lie] = {  # from what the liar believes, and what the honest believe together
    "random": lambda own, _, rng: rng.dirichlet([1, 1], len(own)),
    "inverted": lambda own, _, __: own[:, ::-1],
    "inverted, and sure": lambda own, _, __: np.eye(2)[1 - own.argmax(1)],
    "against the majority, and sure": lambda _, honest, __: np.eye(2)[1 - honest.argmax(1)],
    "constant": lambda own, _, __: np.tile([0.0, 1.0], (len(own), 1)),
}


def unsure(confidence: float, rng: np.random.Generator) -> Floats:
    """Right about four texts of five exactly, and about as sure as `confidence` says, whether right or not."""
    said = np.where(rng.permutation(TEXTS) < 0.8 * TEXTS, TRUTH, 1 - TRUTH)
    sure = np.clip(rng.normal(confidence, 0.1, TEXTS), 0.51, 0.99)
    return np.where(np.arange(2)[None] == said[:, None], sure[:, None], 1 - sure[:, None])


@pytest.mark.parametrize("kind", LIES)
@pytest.mark.parametrize("form", ["probabilities", "agree"])
@pytest.mark.parametrize(("honest", "margin"), [(3, 0.0), (2, 0.03)])
@pytest.mark.parametrize("confidence", [0.65, 0.72])
def test_a_liar_does_not_beat_honest_judges_that_are_unsure(
    kind: str, form: Form, honest: int, margin: float, confidence: float
) -> None:
    """Three of them, or two if one is late: the verdict is as good as without the liar, and as the best of them.

    Two that disagree are a coin toss, for which the margin is.
    """
    for seed in range(5):
        rng = np.random.default_rng(seed)
        said = [unsure(confidence, rng) for _ in range(honest)]
        lie = LIES[kind](unsure(confidence, rng), np.sum(said, 0), rng)
        ballots = [Ballot(decode(encode(rows, WRITTEN, form), WRITTEN, 2, form)) for rows in (*said, lie)]
        verdict = combine(ballots, WRITTEN)

        assert right(verdict) >= right(combine(ballots[:-1], WRITTEN)) - max(margin, 0.01)
        assert right(verdict) >= 0.8 - margin
        assert verdict.weights[-1] < 0.5 * min(verdict.weights[:-1])


def test_who_answers_more_texts_than_others_is_not_its_own_witness() -> None:
    """A liar that answers what no other does is measured by what they answer, too."""
    first, both = frozenset([0]), [0, 1] * (TEXTS // 2)
    honest = [Ballot(judge(0.8, seed).probabilities, covers=first) for seed in (1, 2)]
    verdict = combine([*honest, LIARS["inverted, and sure"]], both)

    assert verdict.weights[2] == 0
    assert min(verdict.weights[:2]) > 0.5
    assert (verdict.answers == [2, 0] * (TEXTS // 2)).all()


def test_where_nobody_agrees_votes_count_and_not_how_sure_they_are() -> None:
    """Each agrees with each about half of the texts, as by chance: three equal votes, and the surest has no more.

    One that says itself that it guesses has none.
    """
    calm, loud = np.array([[0.6, 0.4], [0.4, 0.6]]), np.eye(2)
    guesses = Ballot(loud[[1, 1, 1, 1]], 0.5)
    verdict = combine([Ballot(calm[[0, 0, 1, 1]]), Ballot(calm[[0, 1, 0, 1]]), Ballot(loud[[0, 1, 1, 0]]), guesses], [0] * 4)

    np.testing.assert_allclose(verdict.soft[:, 0], [1, 1 / 3, 1 / 3, 1 / 3])
    assert verdict.answers.tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(("judges", "soft"), [(1, 0.9), (2, 0.75), (3, 2 / 3)])
def test_where_all_say_that_they_guess_they_are_heard_alike(judges: int, soft: float) -> None:
    """A verdict by nobody would be none: one is taken at its word, of two the mean, of three the votes."""
    said = np.array([[[0.9, 0.1]], [[0.6, 0.4]], [[0.0, 1.0]]])
    verdict = combine([Ballot(rows, claim) for rows, claim in zip(said[:judges], (0.5, 0.2, 0.0), strict=False)], [0])

    assert verdict.soft[0, 0] == pytest.approx(soft)
    assert verdict.answers.tolist() == [judges]


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
