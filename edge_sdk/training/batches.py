"""Which examples meet in which training step; pure, so a run can be replayed from its seed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import SettingsError


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a device trains between receiving a version and answering it.

    Args:
        steps: optimizer steps.
        batch_size: labelled examples in each step.
        learning_rate: of AdamW, constant.
        clip: largest norm of one step's gradient.
        dropout: share of activations dropped while training, in the base's own dropout layers and before LoRA. It is
            what a student that starts as its own teacher learns against (Xie et al. 2020, noisy student).
    """

    steps: int = 10
    batch_size: int = 16
    learning_rate: float = 1e-3
    clip: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 100_000 or not 1 <= self.batch_size <= 4096:
            raise SettingsError("training.steps must be between 1 and 100000, training.batch_size between 1 and 4096")
        if not 0 < self.learning_rate <= 1 or not 0 < self.clip < math.inf:
            raise SettingsError("training.learning_rate must be in (0, 1], training.clip positive and finite")
        if not 0 <= self.dropout < 1:
            raise SettingsError("training.dropout must be in [0, 1)")


def epochs(count: int, batch_size: int, steps: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """`steps` batches of at most `batch_size` distinct indices below `count`; every index once before any comes twice.

    A batch at the end of a pass may be smaller; with `count` 0 every batch is empty.
    """
    queue = np.empty(0, np.int64)
    for _ in range(steps):
        if len(queue) == 0 and count:
            queue = rng.permutation(count)
        yield queue[:batch_size]
        queue = queue[batch_size:]
