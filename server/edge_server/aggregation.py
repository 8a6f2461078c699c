"""How updates become the next adapter; pure functions over named arrays.

`fedbuff` averages the factors A and B each on its own: what federated LoRA usually does, and exact where A is frozen or only
one factor moved. `products` averages what the factors do, BA, and so takes updates of any rank. In both, a slot is averaged
over the devices that trained it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sdk.adapters import AdapterSpec, Array, Arrays, add, not_finite, weighted_mean
from edge_sdk.errors import DataError


@dataclass(frozen=True)
class Contribution:
    """One buffered update.

    Args:
        delta: trained - base, of the part that was trained.
        num_examples: how many examples it rests on.
        staleness: how many versions old its base is.
        base: the whole adapter it started from; `products` needs it.
    """

    delta: Arrays
    num_examples: int
    staleness: int
    base: Arrays | None = None


def staleness_weight(staleness: int, exponent: float = 0.5) -> float:
    """(1 + staleness)^-exponent; staleness = server version - base version. Nguyen et al. 2022 (FedBuff), section 5."""
    return float((1 + staleness) ** -exponent)


def weight(update: Contribution, exponent: float, cap: int) -> float:
    """min(num_examples, cap) * (1 + staleness)^-exponent."""
    return min(update.num_examples, cap) * staleness_weight(update.staleness, exponent)


def fedbuff(
    adapter: Arrays, buffer: Iterable[Contribution], server_lr: float = 1.0, exponent: float = 0.5, cap: int = 10_000
) -> dict[str, Array]:
    """new = adapter + server_lr * sum(w_i delta_i) / sum(w_i), each array over the updates that have it; w_i as in `weight`.

    The sum is divided by the *sum of weights*, not by the buffer's size as in the FedBuff paper (Algorithm 1): so a
    buffer of fresh updates of all devices, at server_lr 1, is exactly FedAvg (McMahan et al. 2017). An update of a smaller
    rank counts as zero beyond it, which is exact where A is frozen. A sum beyond float32 leaves the adapter as it is: finite
    updates of hostile size must not end the run.

    Raises:
        DataError: the buffer is empty.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        new = add(adapter, weighted_mean((c.delta, weight(c, exponent, cap)) for c in buffer), server_lr)
    return dict(adapter) if not_finite(new) else new


def products(
    adapter: Arrays,
    spec: AdapterSpec,
    buffer: Iterable[Contribution],
    server_lr: float = 1.0,
    exponent: float = 0.5,
    cap: int = 10_000,
) -> dict[str, Array]:
    """BA_new = the best rank-r approximation of BA + server_lr * sum(w_i (B_i A_i - B_0i A_0i)) / sum(w_i).

    B_i A_i is what update i was trained to, B_0i A_0i what it started from: the first components of its base. The factors come
    out in order of size, so the first components of the new adapter are in turn its best approximation of a smaller rank,
    and a device of small rank just takes these. A's rows are orthogonal and as long as at the start of a run
    (1 / sqrt 3), so no component is lost to training. Source: Bai et al. 2024, "FlexLoRA", section 3.

    Raises:
        DataError: the buffer is empty, or an update has no base.
    """
    left: dict[str, list[Array]] = {}
    right: dict[str, list[Array]] = {}
    total: dict[str, float] = {}
    for update in buffer:
        if update.base is None:
            raise DataError("cannot average products: an update has no base")
        w = weight(update, exponent, cap)
        for slot in spec.slots:
            if slot.b not in update.delta:
                continue
            rank = update.delta[slot.b].shape[1]
            a, b = update.base[slot.a][:rank], update.base[slot.b][:, :rank]
            trained_a = a + update.delta[slot.a] if slot.a in update.delta else a
            left.setdefault(slot.module, []).extend([w * (b + update.delta[slot.b]), -w * b])
            right.setdefault(slot.module, []).extend([trained_a, a])
            total[slot.module] = total.get(slot.module, 0.0) + w
    if not total:
        raise DataError("cannot average: the buffer is empty")
    new = dict(adapter)
    with np.errstate(over="ignore", invalid="ignore"):  # of hostile updates; the result is looked at
        for slot in spec.slots:
            if slot.module in total:
                step = [x * (server_lr / total[slot.module]) for x in left[slot.module]]
                lefts, rights = np.hstack([adapter[slot.b], *step]), np.vstack([adapter[slot.a], *right[slot.module]])
                new[slot.b], new[slot.a] = factors(lefts, rights, spec.rank)
    return dict(adapter) if not_finite(new) else new


def factors(left: NDArray[Any], right: NDArray[Any], rank: int) -> tuple[Array, Array]:
    """B (out, rank) and A (rank, in) with BA the best approximation of `left @ right`, without ever forming it.

    Args:
        left: (out, n). right: (n, in), both of any n.

    Returns:
        The largest components first; A's rows orthogonal and 1 / sqrt 3 long, also where B's columns are zero.
    """
    size = 1 / math.sqrt(3)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        nan = np.float32(np.nan)
        return np.full((len(left), rank), nan), np.full((rank, right.shape[1]), nan)
    q1, r1 = np.linalg.qr(left.astype(np.float64))
    q2, r2 = np.linalg.qr(right.T.astype(np.float64))
    u, sigma, v = np.linalg.svd(r1 @ r2.T)
    sigma = np.pad(sigma, (0, max(rank - len(sigma), 0)))[:rank]
    b = np.zeros((len(left), rank))
    kept = min(rank, u.shape[1])
    b[:, :kept] = (q1 @ u[:, :kept]) * (sigma[:kept] / size)
    rows = np.zeros((rank, right.shape[1]))
    directions = (q2 @ v.T)[:, :rank].T * size
    rows[: len(directions)] = directions
    return b.astype(np.float32), rows.astype(np.float32)
