"""Rules that keep hostile updates from steering a version; pure functions from one buffer to the buffer that is averaged.

What has been accepted is finite, of the right shapes, one update for each device and version, not too stale. That leaves its
size, its direction and the examples it claims, and every device may send what it likes. `bounded` sees to size and claim, for
which it needs three updates; the others to direction, too, for which they need more honest updates than hostile ones, and honest
ones that agree.

How many examples an update rests on is what the device says, and would buy votes. A rule that chooses (`median`, `trimmed_mean`,
`krum`) counts each update once; an older base counts in full, as `max_staleness` allowed it. `NormBounded` counts each once, too,
and less where it is stale, which the server sees for itself. `bounded` counts each for at most the median claim.

Factors and products: (B + dB)(A + dA) - BA is what an update does, and many pairs dB, dA do the same, since the components can be
turned. Krum therefore measures what updates do. The median and the trimmed mean go by single numbers, so they need all devices to
mean the same by the i-th component: they do where all come from one starting adapter that was only ever added to, as the average
of factors is, and do not after the average of products, which turns the components at every version. Even then the product of two
medians is no median of products (with A frozen it comes closest): every number stays between honest ones, no more is promised.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_sdk.adapters import AdapterSpec, Arrays, shapes_of
from edge_sdk.errors import DataError, SettingsError
from edge_server.aggregation import Contribution

Floats = NDArray[np.float64]


class Mean(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="mean", tag_field="name"):
    """Every update by its weight."""


class Median(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="median", tag_field="name"):
    """The median of every single number; withstands any minority."""


class TrimmedMean(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="trimmed_mean", tag_field="name"):
    """The mean of every single number without its `byzantine` largest and smallest values; withstands so many updates."""

    byzantine: int = 1

    def __post_init__(self) -> None:
        if self.byzantine < 1:
            raise SettingsError("rule.byzantine must be at least 1: else take the mean")


class Krum(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="krum", tag_field="name"):
    """The mean of the `keep` updates nearest to the others; withstands `byzantine` of them."""

    byzantine: int = 1
    keep: int = 1

    def __post_init__(self) -> None:
        if self.byzantine < 1 or self.keep < 1:
            raise SettingsError("rule.byzantine and rule.keep must be at least 1: else take the mean")


class NormBounded(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="norm_bounded", tag_field="name"):
    """Every update once, less its staleness, and at most as long as the L2 norm `norm`, or as the median size where that is 0."""

    norm: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.norm < math.inf:
            raise SettingsError("rule.norm must be finite and not negative; 0 for the median of the buffer")


Rule = Mean | Median | TrimmedMean | Krum | NormBounded
COMPARABLE = 3  # updates among which one can be told to be out of the ordinary


def fewest(rule: Rule) -> int:
    """How many updates of one buffer the rule needs to keep its promise."""
    match rule:
        case Median() | NormBounded(norm=0):
            return COMPARABLE
        case TrimmedMean(byzantine):
            return 2 * byzantine + 1
        case Krum(byzantine, keep):
            return max(2 * byzantine + 3, keep + byzantine)
        case _:
            return 1


def apply(rule: Rule, buffer: Sequence[Contribution], spec: AdapterSpec) -> list[Contribution]:
    """What is left of a buffer to be averaged.

    Raises:
        DataError: updates of different parts of the adapter, too few of them, or, for Krum, one without its base.
    """
    match rule:
        case Median():
            return [median(buffer)]
        case TrimmedMean(byzantine):
            return [trimmed_mean(buffer, byzantine)]
        case Krum(byzantine, keep):
            return krum(buffer, spec, byzantine, keep)
        case NormBounded(norm):
            held = [clip(update, norm) for update in buffer] if norm else bounded(buffer, 1.0)
            return [replace(update, num_examples=1) for update in held]
        case _:
            return list(buffer)


def norm(delta: Arrays) -> float:
    """The L2 norm of all numbers of a delta."""
    return math.sqrt(sum(float(np.vdot(wide, wide)) for wide in (array.astype(np.float64) for array in delta.values())))


def clip(update: Contribution, limit: float) -> Contribution:
    """The update, its delta scaled down to at most the L2 norm `limit`, by which its direction stays.

    What a delta of both factors does is bounded by this too, though not scaled by the same: it is B0 dA + dB A0 + dB dA, of which
    the last part shrinks by the square.
    """
    if (size := norm(update.delta)) <= limit:
        return update
    scale = np.float64(limit / size)
    return replace(update, delta={name: (array * scale).astype(np.float32) for name, array in update.delta.items()})


def bounded(buffer: Sequence[Contribution], times: float) -> list[Contribution]:
    """Every update held to `times` the median size of the buffer's, and to its median examples; of fewer than three, none is.

    A size is the root mean square of a delta's numbers, so that a device that trained fewer layers or components is measured by
    the same rule. It is relative since an absolute norm would have to be known before the first version, for each model, rank and
    learning rate; a minority cannot move a median out of the honest sizes. Source: Sun et al. 2019, "Can You Really Backdoor
    Federated Learning?" (norm thresholding).

    Claims are cut at the median itself: half of the updates then weigh alike, so none of n fresh ones has more than 2 / n of the
    weight. At twice the median one of four equal devices would have 2/5 of it, and with 1.25 times the size stop what the others
    do. Source: Portnoy et al. 2022, "Towards Federated Learning with Byzantine-Robust Client Weighting" (they truncate weights,
    at another bound).
    """
    if len(buffer) < COMPARABLE:
        return list(buffer)
    most = int(statistics.median(update.num_examples for update in buffer))
    buffer = [replace(c, num_examples=most) if c.num_examples > most else c for c in buffer]
    counts = [math.sqrt(sum(array.size for array in update.delta.values())) for update in buffer]
    norms = [norm(update.delta) for update in buffer]
    limit = times * float(np.median(np.divide(norms, counts)))
    long = [own > limit * count for own, count in zip(norms, counts, strict=True)]
    return [clip(c, limit * count) if cut else c for c, count, cut in zip(buffer, counts, long, strict=True)]


def median(buffer: Sequence[Contribution]) -> Contribution:
    """The median of every single number, one update in the place of all; the mean of the middle two where their number is even.

    With fewer hostile updates than honest ones it lies between honest values. Source: Yin et al. 2018, "Byzantine-Robust
    Distributed Learning", definition 1.

    Raises:
        DataError: no updates, or updates of different parts.
    """
    return Contribution({name: np.median(each, axis=0).astype(np.float32) for name, each in _stacked(buffer).items()}, 1, 0)


def trimmed_mean(buffer: Sequence[Contribution], byzantine: int) -> Contribution:
    """The mean of every single number without the `byzantine` largest and smallest values, one update in the place of all.

    With at most `byzantine` hostile updates it lies between honest values. Source: Yin et al. 2018, definition 2; they cut a
    share beta of n, which is byzantine / n.

    Raises:
        DataError: updates of different parts, or not more than twice `byzantine`.
    """
    if len(buffer) <= 2 * byzantine:
        raise DataError(f"to cut {byzantine} values from either end takes more than {2 * byzantine} updates")
    kept = slice(byzantine, len(buffer) - byzantine)
    ordered = {name: np.sort(each, axis=0) for name, each in _stacked(buffer).items()}
    return Contribution({name: each[kept].mean(axis=0).astype(np.float32) for name, each in ordered.items()}, 1, 0)


def krum(buffer: Sequence[Contribution], spec: AdapterSpec, byzantine: int, keep: int = 1) -> list[Contribution]:
    """The `keep` updates with the smallest sum of squared distances to their n - byzantine - 2 nearest, each of weight 1.

    Source: Blanchard et al. 2017, "Machine Learning with Adversaries", section 4; keeping more than one is their Multi-Krum.

    Raises:
        DataError: updates of different parts or without a base, fewer than 2 byzantine + 3, or than keep + byzantine.
    """
    n, needed = len(buffer), fewest(Krum(byzantine, keep))
    if n < needed:
        raise DataError(f"Krum keeps {keep} updates in spite of {byzantine} hostile ones with {needed} or more, not {n}")
    nearest = np.sort(distances(buffer, spec), axis=1)[:, 1 : n - byzantine - 1]  # without itself, which comes first
    chosen = np.argsort(nearest.sum(axis=1), kind="stable")[:keep]
    return [replace(buffer[i], num_examples=1, staleness=0) for i in chosen]


def distances(buffer: Sequence[Contribution], spec: AdapterSpec) -> Floats:
    """Squared Frobenius distances (n, n) between what updates do, summed over slots.

    An update does S = (B + dB)(A + dA) - BA = [dB, B] [A + dA; dA], of which no (out, in) matrix is ever made: the inner products
    of all pairs are <L R, L' R'> = sum((L^T L') * (R R'^T)), with matrices as small as the rank.

    Raises:
        DataError: no updates, updates of different parts, or one without its base.
    """
    _same_part(buffer)
    n = len(buffer)
    inner = np.zeros((n, n))
    for slot in spec.slots:
        lefts: list[NDArray[Any]] = []
        rights: list[NDArray[Any]] = []
        for update in buffer:
            if update.base is None:
                raise DataError("cannot tell what an update does: it has no base")
            if (moved := update.delta.get(slot.b)) is None:
                continue
            rank = moved.shape[1]
            a, b = update.base[slot.a][:rank], update.base[slot.b][:, :rank]
            turned = update.delta.get(slot.a, np.zeros_like(a))
            lefts += [moved, b]
            rights += [a.astype(np.float64) + turned, turned]
        if lefts:
            left, right = np.hstack(lefts).astype(np.float64), np.vstack(rights).astype(np.float64)
            inner += ((left.T @ left) * (right @ right.T)).reshape(n, -1, n, left.shape[1] // n).sum(axis=(1, 3))
    squares = inner.diagonal()
    found = np.maximum(squares[:, None] + squares - 2 * inner, 0.0)
    np.fill_diagonal(found, 0.0)
    return found


def _stacked(buffer: Sequence[Contribution]) -> dict[str, Floats]:
    """Each array of all updates, (n, *shape); float64, in which no mean of float32 overflows."""
    _same_part(buffer)
    return {name: np.stack([update.delta[name] for update in buffer]).astype(np.float64) for name in buffer[0].delta}


def _same_part(buffer: Sequence[Contribution]) -> None:
    if not buffer:
        raise DataError("there is no update to choose from")
    if any(shapes_of(update.delta) != shapes_of(buffer[0].delta) for update in buffer):
        raise DataError("updates of different parts of the adapter cannot be compared number by number")
