"""What many judges together make of texts, and whom of them to believe; pure.

A judge is believed as far as its votes agree with those of the others, not as far as it says it should be: the one-coin model
of Dawid & Skene 1979. So a minority that answers at random, always the same or the wrong way round gets no say. That model knows
votes alone, the likeliest class of each answer: how sure a judge is of itself counts in the verdict, never in whom to believe.
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
        covers: labels it knows from its own data; texts written for other labels are none of its business. None for all: a judge
            that has no data of its own.
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
    acc_k how often the vote of judge k agrees with the weighted votes of the others, each class counting alike, at most what it
    claims. It starts from the share of all votes, its own among them: two who agree then outweigh a third who never does.

    Of two that answer nobody can say who is right: they weigh alike, whatever they claim. Where there are more and none agrees
    with another, the shares of their votes are the verdict. A judge that claims no more than chance has no say, unless all do.

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
    claims = np.array([_log_odds(min(b.claimed, SURE), n_classes) for b in ballots])
    weights = (claims > 0).astype(np.float64) if claims.any() else np.ones(len(ballots))
    if there.any(1).sum() > 2:
        votes = np.eye(n_classes)[answers.argmax(2)] * there[:, :, None]
        believed = _believed(votes, claims)
        weights, answers = (believed, answers) if believed.any() else (weights, votes)
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


def _believed(votes: Floats, claims: Floats) -> Floats:
    """The weight of each judge, (judges,), from votes (judges, n, n_classes): 1 for a class, or 0 for all where there is none."""
    weights = (claims > 0).astype(np.float64)
    for step in range(ROUNDS):
        own = weights if step == 0 else np.zeros(len(votes))
        weights = np.array([min(claims[k], _agreement(k, votes, weights, own[k])) for k in range(len(votes))])
    return weights


def _agreement(k: int, votes: Floats, weights: Floats, own: float) -> float:
    """Log odds that judge k is right where others voted too, taking their weighted votes, and by `own` its own, for the truth."""
    others = weights.copy()
    others[k] = 0
    truth = np.einsum("k,knc->nc", others, votes)
    common = (votes[k].sum(1) > 0) & (truth.sum(1) > 0)
    if not common.any():
        return 0.0
    said = votes[k][common]
    truth = truth[common] + own * said
    truth /= truth.sum(1, keepdims=True)
    mass = truth.sum(0)
    right = float(((truth * said).sum(0)[mass > 0] / mass[mass > 0]).mean())  # each class alike: one answer to all is chance
    return _log_odds(min(right, SURE), votes.shape[2])


def _log_odds(accuracy: float, n_classes: int) -> float:
    return max(0.0, math.log((n_classes - 1) * accuracy / (1 - accuracy))) if accuracy > 0 else 0.0
