"""Texts that calibrate a quantization and texts that judge it, and how two engines' answers are compared.

`probe.jsonl` holds 240 sentences of the ICWSM-14 sentiment data (Hutto & Gilbert 2014, MIT licence), 60 of each of its four
domains, half of them positive, none of them in the test part that benches count on. Other models deserve texts of their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import DataError
from edge_sdk.tasks import accuracy, log_softmax

DEFAULT = Path(__file__).with_name("probe.jsonl")


@dataclass(frozen=True)
class Probe:
    """Texts by what they are for; labels are class indices, or None where nobody knows.

    Args:
        calibrate: the quantizer sees what the model makes of these.
        choose: how many layers get finer activations is chosen on these.
        judge: what is reported, and compared with the floor, is measured on these.
        labels: of `judge`.
    """

    calibrate: tuple[str, ...]
    choose: tuple[str, ...]
    judge: tuple[str, ...]
    labels: tuple[int | None, ...]


@dataclass(frozen=True)
class Agreement:
    """How near one engine's class scores are to another's.

    Args:
        r: Pearson correlation of the scores, each text's mean and each class's mean taken out.
        kl: mean KL(reference || engine) of the class probabilities, in nats.
        accuracy_change: engine minus reference, as a fraction; None without labels.
    """

    r: float
    kl: float
    accuracy_change: float | None


def read(path: Path, labels: Sequence[str]) -> Probe:
    """A quarter of the file's texts calibrates, a quarter chooses, and half judges; dealt in turn.

    Raises:
        DataError: not such a file, or fewer than 32 texts.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [(str(row["text"]), None if row.get("label") is None else str(row["label"])) for row in rows]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f'{path} is not a file of JSON lines with "text" and perhaps "label" ({error!r})') from error
    if len(found) < 32:
        raise DataError(f"{path} has {len(found)} texts; a probe needs at least 32, better 200")
    texts = tuple(text for text, _ in found)
    known = {label: index for index, label in enumerate(labels)}
    judge = [row for at, row in enumerate(found) if at % 4 > 1]
    return Probe(texts[0::4], texts[1::4], tuple(t for t, _ in judge), tuple(known.get(label or "") for _, label in judge))


def compare(reference: NDArray[np.float32], scores: NDArray[np.float32], labels: Sequence[int | None] = ()) -> Agreement:
    """Both (n, n_classes), before the softmax."""
    p, q = log_softmax(reference), log_softmax(scores)
    kl = float((np.exp(p) * (p - q)).sum(axis=1).mean())
    known = [i for i, label in enumerate(labels) if label is not None]
    change = None
    if known:
        truths = [label for label in labels if label is not None]
        change = accuracy(scores[known], truths) - accuracy(reference[known], truths)
    return Agreement(correlation(reference, scores), max(kl, 0.0), change)


def correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Of two classes that of the differences between their scores; 0 where one side never varies."""
    if not len(a):
        return 0.0
    x, y = _centred(a), _centred(b)
    size = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / size if size > 0 else 0.0


def _centred(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    z = scores.astype(np.float64)
    z -= z.mean(axis=1, keepdims=True)
    return np.asarray(z - z.mean(axis=0, keepdims=True))
