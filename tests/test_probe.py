"""Agreement by exact values, and probe files that are what they should be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from edge_export import probe
from edge_sdk.errors import DataError
from tests import strategies


def test_an_engine_agrees_with_itself() -> None:
    """The same scores: r = 1, no divergence, no change of accuracy."""
    scores = np.array([[1, 2], [4, 3], [0, 5]], np.float32)
    found = probe.compare(scores, scores, [1, 0, 0])

    assert found.r == pytest.approx(1.0)
    assert (found.kl, found.accuracy_change) == (0.0, 0.0)


def test_agreement_of_known_scores() -> None:
    """For two classes r is the correlation of the differences; KL and accuracy are as computed by hand."""
    reference = np.log(np.array([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]], np.float32))
    other = np.log(np.array([[0.4, 0.6], [0.8, 0.2], [0.6, 0.4]], np.float32))
    found = probe.compare(reference, other, [1, 0, None])
    expected_kl = (
        0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6)
        + 0.9 * math.log(0.9 / 0.8) + 0.1 * math.log(0.1 / 0.2)
        + 0.2 * math.log(0.2 / 0.6) + 0.8 * math.log(0.8 / 0.4)
    ) / 3  # fmt: skip
    difference = [(s[:, 1] - s[:, 0]) for s in (reference, other)]

    assert found.r == pytest.approx(np.corrcoef(difference[0], difference[1])[0, 1], abs=1e-6)
    assert found.kl == pytest.approx(expected_kl, abs=1e-6)
    assert found.accuracy_change == 0.5  # the first text: a tie goes to class 0 in the reference


def test_a_common_lean_is_no_agreement() -> None:
    """Two engines that both prefer one class for every text, but order the texts oppositely, disagree: r = -1."""
    reference = np.array([[0, 10.0], [0, 10.1], [0, 10.2]], np.float32)
    other = np.array([[0, 10.2], [0, 10.1], [0, 10.0]], np.float32)

    assert probe.correlation(reference, other) == pytest.approx(-1.0, abs=1e-4)


def test_scores_that_never_vary_agree_with_nothing() -> None:
    """A constant engine has r = 0, not NaN."""
    assert probe.correlation(np.ones((4, 2), np.float32), np.eye(4, 2, dtype=np.float32)) == 0.0


@given(strategies.score_tables())
def test_r_ignores_what_the_softmax_ignores(scores: strategies.Scores) -> None:
    """Adding a number to a text's scores, or scaling all scores, changes no correlation."""
    shifted = 2 * scores + np.arange(len(scores), dtype=np.float32)[:, None]

    assert probe.correlation(scores, shifted) == pytest.approx(1.0, abs=1e-4) or probe.correlation(scores, scores) == 0


def test_our_own_probe_is_balanced() -> None:
    """240 texts, every part half positive, no text twice."""
    found = probe.read(probe.DEFAULT, ("negative", "positive"))
    texts = [*found.calibrate, *found.choose, *found.judge]

    assert len(texts) == len(set(texts)) == 240
    assert (len(found.calibrate), len(found.choose), len(found.judge)) == (60, 60, 120)
    assert sum(label for label in found.labels if label) == 60


def test_our_own_probe_holds_no_test_sentence() -> None:
    """Nothing that benches count accuracy on has calibrated anything."""
    from bench import fleet

    test = {e.text.strip() for domain in fleet.domains().values() for e in domain.test}
    found = probe.read(probe.DEFAULT, ("negative", "positive"))

    assert test.isdisjoint([*found.calibrate, *found.choose, *found.judge])


def test_labels_nobody_knows_are_no_labels(tmp_path: Path) -> None:
    """With other class names the probe still measures agreement, only no accuracy."""
    found = probe.read(probe.DEFAULT, ("yes", "no"))

    assert set(found.labels) == {None}


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}\n" * 40, '{"text": 1', "\n".join(json.dumps({"text": "a"}) for _ in range(31))]
)
def test_a_file_that_is_no_probe_is_refused(tmp_path: Path, content: str | None) -> None:
    """Missing, foreign, garbled and short files are errors of ours that name the file."""
    path = tmp_path / "probe.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"probe\.jsonl"):
        probe.read(path, ("a", "b"))
