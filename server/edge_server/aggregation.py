"""How updates become the next adapter; pure functions over named arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from edge_sdk.adapters import Array, Arrays, add, not_finite, weighted_mean


@dataclass(frozen=True)
class Contribution:
    """One buffered update: trained - base, how many examples it rests on, and how old its base was when it arrived."""

    delta: Arrays
    num_examples: int
    staleness: int


def staleness_weight(staleness: int, exponent: float = 0.5) -> float:
    """(1 + staleness)^-exponent; staleness = server version - base version. Nguyen et al. 2022 (FedBuff), section 5."""
    return float((1 + staleness) ** -exponent)


def fedbuff(
    adapter: Arrays, buffer: Iterable[Contribution], server_lr: float = 1.0, exponent: float = 0.5, cap: int = 10_000
) -> dict[str, Array]:
    """new = adapter + server_lr * sum(w_i delta_i) / sum(w_i), with w_i = min(num_examples_i, cap) * (1 + staleness_i)^-exponent.

    The sum is divided by the *sum of weights*, not by the buffer's size as in the FedBuff paper (Algorithm 1): so a
    buffer of fresh updates of all devices, at server_lr 1, is exactly FedAvg (McMahan et al. 2017). A sum beyond float32
    leaves the adapter as it is: finite updates of hostile size must not end the run.

    Raises:
        DataError: the buffer is empty.
    """
    weighted = ((c.delta, min(c.num_examples, cap) * staleness_weight(c.staleness, exponent)) for c in buffer)
    with np.errstate(over="ignore", invalid="ignore"):
        new = add(adapter, weighted_mean(weighted), server_lr)
    return dict(adapter) if not_finite(new) else new
