"""What many judges together make of texts, and whom of them to believe; pure.

A judge is believed as far as it agrees with the others, not as far as it says it should be: the one-coin model of Dawid &
Skene 1979. So a minority that answers at random, always the same or the wrong way round gets no say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import DataError

Floats = NDArray[np.float64]

ROUNDS = 20
SURE = 0.98  # nobody is believed to be right more often than this
UNKNOWN = 0.75  # what is claimed by a judge that has nothing to measure itself by


@dataclass(frozen=True)
class Ballot:
    """One judge's answers.

    Args:
        probabilities: (n, n_classes); a row of zeros is no answer.
        claimed: the accuracy it says it has on its own validation data; it can only lower its weight.
        covers: labels it knows from its own data; texts written for other labels are none of its business. None for all.
    """

    probabilities: Floats
    claimed: float = 1.0
    covers: frozenset[int] | None = None


@dataclass(frozen=True)
class Verdict:
    """Args:
    soft: combined class probabilities (n, n_classes); zeros where nobody answered.
    weights: of each judge. answers: how many judges with a say answered each text, (n,).
    """

    soft: Floats
    weights: tuple[float, ...]
    answers: NDArray[np.int64]


def combine(ballots: Sequence[Ballot], written: Sequence[int]) -> Verdict:
    """Weighted mean of the judges' probabilities, p_j = sum_k a_k p_kj / sum_k a_k.

    a_k = max(0, ln((n_classes - 1) acc_k / (1 - acc_k))), the log odds of being right where chance is 1 / n_classes, with
    acc_k how often judge k agrees with the mean of the others, each class counting alike, at most what it claims. It starts
    from equal weights.

    Args:
        written: the label each text was written for, (n,).

    Raises:
        DataError: no judge, or shapes differ.
    """
    if not ballots:
        raise DataError("nobody has judged these texts")
    shapes = {b.probabilities.shape for b in ballots}
    if len(shapes) != 1 or next(iter(shapes))[0] != len(written):
        raise DataError(f"judgments of {len(written)} texts have shapes {sorted(shapes)}")
    n_classes = next(iter(shapes))[1]
    answers = np.stack([_answers(b, written) for b in ballots])  # (judges, n, n_classes)
    there = answers.sum(2) > 0
    weights = np.array([_log_odds(min(b.claimed, SURE), n_classes) for b in ballots])
    claims = weights.copy()
    if len(ballots) > 2:  # of two that disagree nobody can say who is right
        weights = np.minimum(claims, 1.0)
        for _ in range(ROUNDS):
            weights = np.array([min(claims[k], _agreement(k, answers, there, weights, n_classes)) for k in range(len(ballots))])
    if not weights.any():
        weights = np.where(claims > 0, 1e-6, 0.0) if claims.any() else np.full(len(ballots), 1e-6)
    total = np.einsum("k,knc->nc", weights, answers)
    mass = np.einsum("k,kn->n", weights, there)
    soft = np.divide(total, mass[:, None], out=np.zeros_like(total), where=mass[:, None] > 0)
    soft = np.minimum(soft, 1.0)  # sums in another order may be a last bit more
    return Verdict(soft, tuple(map(float, weights)), (there & (weights > 0)[:, None]).sum(0))


def guest(probabilities: Floats, ballots: Sequence[Ballot], written: Sequence[int]) -> Ballot:
    """The ballot of a judge without data of its own: it claims what the best of the others does, and answers only with them."""
    there = np.any([_answers(b, written).sum(1) > 0 for b in ballots], axis=0)
    return Ballot(np.where(there[:, None], probabilities, 0.0), max(b.claimed for b in ballots))


def _answers(ballot: Ballot, written: Sequence[int]) -> Floats:
    """Rows that sum to 1, or to 0 where there is no answer."""
    sums = ballot.probabilities.sum(1, keepdims=True)
    rows: Floats = np.divide(ballot.probabilities, sums, out=np.zeros_like(ballot.probabilities), where=sums > 0)
    if ballot.covers is not None:
        rows[[label not in ballot.covers for label in written]] = 0
    return rows


def _agreement(k: int, answers: Floats, there: NDArray[np.bool_], weights: Floats, n_classes: int) -> float:
    """Log odds that judge k is right, taking the others together for the truth."""
    others = weights.copy()
    others[k] = 0
    truth = np.einsum("k,knc->nc", others, answers)
    common = there[k] & (truth.sum(1) > 0)
    if not common.any():
        return 0.0
    truth = truth[common] / truth[common].sum(1, keepdims=True)
    said = answers[k][common].argmax(1)[:, None] == np.arange(n_classes)
    mass = truth.sum(0)
    right = float(((truth * said).sum(0)[mass > 0] / mass[mass > 0]).mean())  # each class alike: one answer to all is chance
    return _log_odds(min(right, SURE), n_classes)


def _log_odds(accuracy: float, n_classes: int) -> float:
    return max(0.0, math.log((n_classes - 1) * accuracy / (1 - accuracy))) if accuracy > 0 else 0.0
