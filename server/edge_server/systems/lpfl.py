"""LP-FL: low-parameter federated learning with soft labels (Jiang, Liu & Fan 2023, arXiv 2307.13896).

    server:  theta^0 <- LoRA that changes nothing
    device:  theta_k <- Train(theta^t; few labels + soft labels given by theta^t)      edge_sdk/verbs.py
    server:  theta^(t+1) <- theta^t + lr * weighted mean of (theta_k - theta^t)        once K updates are in

The paper's formulas are not public; docs/systems/lpfl.md says what is reconstructed. Departure: the paper averages in
synchronous rounds, here an update counts whenever it arrives, by its staleness (FedBuff) and its examples (up to the median's).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import msgspec

from edge_sdk.adapters import AdapterSpec, Array, Arrays
from edge_sdk.codec import Encoding
from edge_sdk.cohort import Terms
from edge_sdk.errors import SettingsError
from edge_sdk.protocol import Evaluate, Finished, Train, Wait, Work
from edge_sdk.softlabels import SoftLabels
from edge_sdk.training.batches import Training
from edge_server import coordinator, robust
from edge_server.aggregation import Contribution, fedbuff, products
from edge_server.cohorts import Secure
from edge_server.coordinator import Buffered, Device, State
from edge_server.robust import Krum, Mean, Median, Rule, TrimmedMean


class LpFl(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of a run.

    Args:
        versions: how many versions are made before the run is finished.
        buffer_size: updates that make a version (FedBuff's K), each of another device; all devices for synchronous FedAvg. With
            fewer devices than this no version is ever made: count those that may stay away.
        max_staleness: versions an update's base may lie behind; with more it is refused, or dropped where it waited meanwhile.
        deadline_seconds: once the oldest update of the buffer has waited so long, a version is made of what is there, if that
            is at least `least` updates; so a synchronous run does not wait for a dead device for ever. 0 for no deadline.
        least: 0 for as many as `rule` can choose among and, unless `clip_norm` is 0, three, or `buffer_size` where that is fewer.
        lease_seconds: how long a device that was told to train counts as training, if it does not answer.
        concurrency: devices that may train at once (PAPAYA, Huba et al. 2022); others wait. 0 for no limit.
        server_lr: step along the mean update.
        average: `factors`: A and B each on its own, as the paper does; all devices train one rank, unless A is frozen.
            `products`: what they do, BA; devices may train different ranks.
        max_examples: an update counts for at most this many examples, whatever it claims; with `secure` for at most
            `secure.max_weight`, where that is less.
        clip_norm: an update is scaled down to at most so many times the median size of those a version is made from, and counts
            for at most their median examples; 0 for neither, and so for FedAvg's weights.
            Honest ones lie close together, since a step of AdamW is as long as its rate: LP-FL's within 1.12 times (docs/LOG.md).
            Of fewer than three updates none is cut: with `buffer_size` or `least` below three one device can destroy the adapter.
            With `secure` it means nothing, since nobody sees a size: each number is cut at `secure.clip` instead.
        rule: which of the updates a version is made from: all (`mean`, or `norm_bounded`, a tighter `clip_norm` that does not ask
            for examples), or those that agree (`median`, `trimmed_mean`, `krum`), each counted once, whatever its examples and
            staleness; see `robust.py`.
        upload: how the numbers of an update travel: `int8` takes a quarter of the bytes, and what it loses comes with the next
            update of the device.
        wait_seconds: how long an idle device waits before it asks again.
        evaluate_every: devices measure every n-th version, the first and the last; 0 for the last only.
        secure: average without seeing any single update (secure averaging, docs/systems/fedcollm.md); a version is then made of
            devices that trained on one and the same version, and staleness does not exist.
        training: the device's steps.
        soft: how soft labels are used; growth 0 (or None, in Python) for federated learning on real labels alone.
        seed: of the first adapter and of the order of examples.
    """

    versions: int = 8
    buffer_size: int = 4
    max_staleness: int = 8
    deadline_seconds: float = 0.0
    least: int = 0
    lease_seconds: float = 3600.0
    concurrency: int = 0
    server_lr: float = 1.0
    average: Literal["factors", "products"] = "factors"
    max_examples: int = 10_000
    clip_norm: float = 1.25
    rule: Rule = Mean()
    upload: Encoding = "fp32"
    wait_seconds: float = 30.0
    evaluate_every: int = 1
    secure: Secure | None = None
    training: Training = Training()
    soft: SoftLabels | None = SoftLabels()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.versions < 1 or self.buffer_size < 1 or self.max_examples < 1:
            raise SettingsError("lpfl.versions, lpfl.buffer_size and lpfl.max_examples must be at least 1")
        if (secure := self.secure) is not None:
            if self.average != "factors":
                raise SettingsError("lpfl.secure sums updates it cannot see, and products need each one: take factors")
            if self.rule != Mean():
                raise SettingsError("lpfl.secure hides single updates, and lpfl.rule looks at each: take one of the two")
            if self.deadline_seconds:
                raise SettingsError("lpfl.secure has deadlines of its own: leave lpfl.deadline_seconds at 0")
            if self.upload != "fp32":
                raise SettingsError("lpfl.secure has an encoding of its own: leave lpfl.upload at fp32")
            Terms("check", self.buffer_size, secure.threshold, 1, secure.clip, min(secure.max_weight, self.max_examples))
        if self.max_staleness < 0 or self.evaluate_every < 0 or self.seed < 0:
            raise SettingsError("lpfl.max_staleness, lpfl.evaluate_every and lpfl.seed must not be negative")
        if not 0 <= self.clip_norm < math.inf or 0 < self.clip_norm < 1:
            raise SettingsError("lpfl.clip_norm must be at least 1, or 0 for never: half of all updates are above the median")
        if self.buffer_size < (fewest := robust.fewest(self.rule)):
            raise SettingsError(f"lpfl.rule can choose among {fewest} updates or more: lpfl.buffer_size is {self.buffer_size}")
        if self.average == "products" and isinstance(self.rule, Median | TrimmedMean):
            raise SettingsError("lpfl.rule goes by single numbers of A and B, which products turn: take factors, or krum")
        if self.average == "products" and self.upload == "int8":
            raise SettingsError("lpfl.upload int8 makes up for losses later, and products turn A and B: take factors, or fp16")
        if not 0 <= self.least <= self.buffer_size or (self.deadline_seconds and 0 < self.least < fewest):
            raise SettingsError(f"lpfl.least must be {fewest}, the fewest lpfl.rule can choose among, to lpfl.buffer_size, or 0")
        if not 0 <= self.deadline_seconds < math.inf or not 0 < self.lease_seconds < math.inf or self.concurrency < 0:
            raise SettingsError(
                "lpfl.lease_seconds must be positive, lpfl.deadline_seconds and lpfl.concurrency not negative, and all finite"
            )
        if not 0 < self.wait_seconds < math.inf or not 0 < self.server_lr < math.inf:
            raise SettingsError("lpfl.wait_seconds and lpfl.server_lr must be positive and finite")


def start(settings: LpFl, spec: AdapterSpec) -> dict[str, Array]:
    """Version 0: an adapter that changes nothing."""
    return spec.start(settings.seed)


def plan(settings: LpFl, state: State, device: Device, can_train: bool) -> Work:
    """What a device that asks should do now."""
    last = state.version >= settings.versions
    if device.evaluated < state.version and (last or _measured(settings, state.version)):
        return Evaluate(state.version, state.adapter)
    if last:
        return Finished(state.version, state.adapter)
    if device.trained >= state.version or not can_train:
        return Wait(settings.wait_seconds)
    seed, masked = settings.seed + 1 + state.version, settings.secure is not None
    how = settings.training, settings.soft, seed
    return Train(state.version, state.adapter, *how, masked=masked, share=not masked, upload=settings.upload)


def averaged(settings: LpFl, state: State, now: float) -> tuple[Buffered, ...]:
    """The updates the next version is made from; none after the last version, however many late ones come in.

    Args:
        now: seconds since the epoch, for the deadline.
    """
    how = settings.buffer_size, least(settings), settings.deadline_seconds
    return () if state.version >= settings.versions else coordinator.due(state, *how, now)


def least(settings: LpFl) -> int:
    """How many updates make a version at the deadline."""
    needed = max(robust.fewest(settings.rule), robust.COMPARABLE if settings.clip_norm else 1)
    return settings.least or min(needed, settings.buffer_size)


def uncut(settings: LpFl) -> bool:
    """Whether a version may be made of so few updates that `clip_norm`, though set, cuts none."""
    fewest = least(settings) if settings.deadline_seconds else settings.buffer_size
    return settings.clip_norm > 0 and settings.secure is None and fewest < robust.COMPARABLE


def oldest(settings: LpFl, state: State) -> int:
    """The oldest version that is still worth training on."""
    return state.version if settings.secure is not None else state.version - settings.max_staleness


def wants_bases(settings: LpFl) -> bool:
    """Whether `step` looks at what each update started from."""
    return settings.average == "products" or isinstance(settings.rule, Krum)


def step(settings: LpFl, spec: AdapterSpec, adapter: Arrays, buffer: Iterable[Contribution]) -> dict[str, Array]:
    """The next version's adapter, of the updates as `clip_norm` and `rule` leave them."""
    updates = list(buffer)
    updates = robust.bounded(updates, settings.clip_norm) if settings.clip_norm else updates
    updates = robust.apply(settings.rule, updates, spec)
    if settings.average == "products":
        return products(adapter, spec, updates, settings.server_lr, cap=settings.max_examples)
    return fedbuff(adapter, updates, settings.server_lr, cap=settings.max_examples)


def finished(settings: LpFl, state: State) -> bool:
    """Whether the last version is made and every device has measured it."""
    return state.version >= settings.versions and all(d.evaluated >= state.version for d in state.devices.values())


def _measured(settings: LpFl, version: int) -> bool:
    return settings.evaluate_every > 0 and version % settings.evaluate_every == 0
