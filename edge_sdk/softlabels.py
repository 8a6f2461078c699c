"""Which unlabelled texts a device trains on, and how much each counts.

LP-FL (Jiang, Liu & Fan 2023; the paper's formulas are not public, this is the reconstruction of docs/systems/lpfl.md): at
every version the fresh *global* adapter labels all unlabelled texts again, and the soft set, which grows with the version,
takes the most confident of each class. Nothing here reads a clock, a disk or a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import SettingsError


class SoftLabels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a device uses soft labels.

    Args:
        first: first version with soft labels: 0 where the base labels well without training, 1 where it does not.
        growth: texts the soft set gains with every version from `first` on; 0 for none: learning from real labels alone.
        limit: largest share of the unlabelled texts ever taken.
        temperature: of the teacher in the soft loss; below 1 sharpens its labels, see `training/losses.py`.
        weight: of the soft loss beside the loss on real labels.
        batch_size: soft texts in each training step.
    """

    first: int = 0
    growth: int = 64
    limit: float = 0.75
    temperature: float = 0.5
    weight: float = 1.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.first < 0 or self.growth < 0 or not 1 <= self.batch_size <= 4096:
            raise SettingsError("soft.first and soft.growth must not be negative, soft.batch_size between 1 and 4096")
        if not 0 < self.limit <= 1 or not 0 < self.temperature < math.inf or not 0 < self.weight < math.inf:
            raise SettingsError("soft.limit must be in (0, 1], soft.temperature and soft.weight positive and finite")


@dataclass(frozen=True)
class SoftSet:
    """Chosen texts by index (n,), and the teacher's scores for them (n, n_classes), untempered."""

    indices: NDArray[np.int64]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.indices)


def size(settings: SoftLabels, version: int, available: int) -> int:
    """How many texts the soft set aims at in `version`: `growth` more in each, at most `limit` of those available."""
    return min(settings.growth * max(version + 1 - settings.first, 0), int(settings.limit * available))


def choose(scores: NDArray[np.float32], count: int) -> SoftSet:
    """Takes `count` texts, of every class the same share, the most confident first.

    A text belongs to the class with the highest score, and its confidence is the margin to the next. Class-balanced as in
    Zou et al. 2018 (CBST, section 4.2): each class gives the same *share* of its texts. The same *number* would tell a
    device whose texts are mostly positive that half of them are negative.

    Args:
        scores: teacher scores, (n, n_classes).
        count: wanted size of the set; rounding may add up to n_classes - 1.

    Returns:
        Distinct texts in ascending order of index.
    """
    n, n_classes = scores.shape
    if n == 0 or count <= 0:
        return SoftSet(np.empty(0, np.int64), np.empty((0, n_classes), np.float32))
    predicted = scores.argmax(axis=1)
    ordered = np.sort(scores, axis=1)
    margin = ordered[:, -1] - ordered[:, -2]
    chosen: list[NDArray[np.int64]] = []
    for label in range(n_classes):
        of_class = np.flatnonzero(predicted == label)
        share = -(-min(count, n) * len(of_class) // n)
        chosen.append(of_class[np.argsort(-margin[of_class], kind="stable")][:share])
    indices = np.sort(np.concatenate(chosen)).astype(np.int64)
    return SoftSet(indices, scores[indices])
