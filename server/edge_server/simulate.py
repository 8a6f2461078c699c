"""A run in virtual time: the product's own coordinator, LP-FL and device sessions, for thousands of devices in one loop.

    (seconds, device)  the device's action under way is over: it trained, its update arrived, or its pause has passed
    session.step       says what it does next, as in `edge_sdk/agent.py`
    coordinator        takes the update in, as in `ledger.py`; what is due becomes a version before the next device's turn

Only training, sending an update and pauses take time. A device that was told to wait asks again on its own beat; beats before
the next version are skipped for one that has trained, since nothing changes for it but with a version. No socket, disk, clock or
model: what a device learns is the caller's business.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from edge_sdk import session, wire
from edge_sdk.adapters import AdapterSpec, Arrays
from edge_sdk.errors import SettingsError, WireError
from edge_sdk.protocol import Evaluate, Evaluation, Finished, Metrics, Receipt, Train, Update, Wait
from edge_sdk.session import Session
from edge_sdk.verbs import Learned
from edge_server import coordinator, pacing
from edge_server.aggregation import Contribution
from edge_server.coordinator import Published, State
from edge_server.leases import Leases
from edge_server.systems import lpfl
from edge_server.systems.lpfl import LpFl

Learn = Callable[[int, Arrays, int, np.random.Generator], Learned]  # version, its adapter, the device's number, chance


class Tiers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="tiers"):
    """Device k trains for about `means[k % len(means)]` seconds: tiers of equal size, as in NVFlare's edge simulation.

    Args:
        means: seconds of training. spread: standard deviation as a share of the mean; normal, never below zero.
        communication: seconds from the end of training until the update is with the server.
    """

    means: tuple[float, ...] = (100.0, 200.0, 400.0)
    spread: float = 0.01
    communication: float = 5.0

    def __post_init__(self) -> None:
        if not self.means or not all(0 < mean < math.inf for mean in self.means):
            raise SettingsError("tiers.means must be positive and finite, one for each tier")
        if not 0 <= self.spread < math.inf or not 0 <= self.communication < math.inf:
            raise SettingsError("tiers.spread and tiers.communication must not be negative")


class HalfNormal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="half-normal"):
    """Every training takes |N(0, scale)| seconds, drawn anew: what FedBuff saw in production (Nguyen et al. 2022)."""

    scale: float = 200.0
    communication: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf or not 0 <= self.communication < math.inf:
            raise SettingsError("half-normal.scale must be positive and finite, half-normal.communication not negative")


Delays = Tiers | HalfNormal


class Fleet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who takes part; all devices come at once, and train whenever the server lets them.

    Args:
        devices: how many there are.
        delays: how long they take.
        dropout: share of trainings whose result is lost with the device's process, which starts anew after `away_seconds`.
        gone: share of devices that begin to train once and are never heard of again.
        lost: share of requests that never arrive, and of answers; the device repeats them as `session.py` says.
        seed: of delays, losses and learning.
    """

    devices: int = 100
    delays: Delays = Tiers()
    dropout: float = 0.0
    away_seconds: float = 0.0
    gone: float = 0.0
    lost: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.devices < 1 or self.seed < 0 or not 0 <= self.away_seconds < math.inf:
            raise SettingsError("fleet.devices must be at least 1, fleet.seed and fleet.away_seconds not negative")
        if not 0 <= self.dropout < 1 or not 0 <= self.lost < 1 or not 0 <= self.gone <= 1:
            raise SettingsError("fleet.dropout and fleet.lost must be in [0, 1), fleet.gone in [0, 1]")


@dataclass(frozen=True)
class Version:
    """A version when it was published, and what had happened until then.

    Args:
        seconds: since the start of the run, virtual.
        made_of: device and base version of each update it was made of, in order.
        staleness: how many of these were how many versions old.
        metrics: of these, weighted by their examples.
        uploads: times an update arrived, repeated and refused ones too. accepted: updates that count or will count.
        buffered: those that wait for a later version. refused: as too stale. dropped: trained in vain on a device.
    """

    number: int
    seconds: float
    adapter: Arrays
    made_of: tuple[tuple[int, int], ...]
    staleness: Mapping[int, int]
    metrics: Metrics
    uploads: int
    accepted: int
    buffered: int
    refused: int
    dropped: int

    @property
    def wasted(self) -> float:
        """Share of the trainings that were over and came to nothing."""
        return (self.refused + self.dropped) / max(self.accepted + self.refused + self.dropped, 1)


def run(settings: LpFl, spec: AdapterSpec, fleet: Fleet, learn: Learn) -> Iterator[Version]:
    """Every version of a run, from 0 on, as soon as it is made; fewer than `settings.versions` where the run stands still.

    The same arguments give the same versions. What a device learns from a version does not depend on when: its chance is
    seeded by device and version.

    Args:
        learn: called once for each training that is not dropped.

    Raises:
        SettingsError: secure averaging, which is not simulated.
    """
    if settings.secure is not None:
        raise SettingsError("secure averaging cannot be simulated; leave lpfl.secure out")
    return _Run(settings, spec, fleet, learn).versions()


def training_seconds(delays: Delays, device: int, rng: np.random.Generator) -> float:
    match delays:
        case Tiers(means, spread, _):
            mean = means[device % len(means)]
            return max(0.0, float(rng.normal(mean, spread * mean)))
        case HalfNormal(scale, _):
            return abs(float(rng.normal(0.0, scale)))


@dataclass
class _Device:
    """One device's memory; what is under way is `session.doing`."""

    number: int
    rng: np.random.Generator
    gone: bool
    session: Session = field(default_factory=lambda: Session(session.AskForWork()))
    away: bool = True  # its process does not run
    start: Arrays = field(default_factory=dict)  # what it trains from
    outbox: tuple[Update, Contribution] | Evaluation | None = None

    @property
    def id(self) -> str:
        return str(self.number)


class _Run:
    """The loop: the one place that changes anything."""

    def __init__(self, settings: LpFl, spec: AdapterSpec, fleet: Fleet, learn: Learn) -> None:
        self._settings, self._spec, self._fleet, self._learn = settings, spec, fleet, learn
        self._adapter: Arrays = lpfl.start(settings, spec)
        self._state = coordinator.apply(State(), Published(0, "0", 0))
        self._blobs: dict[str, tuple[Update, Contribution]] = {}  # of the buffer
        self._leases = Leases(settings.lease_seconds, settings.concurrency)
        self._uploads = self._accepted = self._refused = self._dropped = 0
        self._now = 0.0
        self._queue: list[tuple[float, int]] = []
        self._waiting: list[tuple[float, float, int]] = []  # since when, beat, device

    def versions(self) -> Iterator[Version]:
        fleet, first = self._fleet, self._version(())
        rngs = [np.random.default_rng((0, fleet.seed, k)) for k in range(fleet.devices)]
        devices = [_Device(k, rng, float(rng.random()) < fleet.gone) for k, rng in enumerate(rngs)]
        for device in devices:
            self._record(coordinator.enroll(self._state, device.id, f"device {device.id}"))
            self._queue.append((0.0, device.number))
        yield first
        while self._state.version < self._settings.versions and (at := min(self._next(), self._deadline())) < math.inf:
            self._now = at
            if self._next() <= at:
                self._go_on(devices[heapq.heappop(self._queue)[1]])
            while batch := lpfl.averaged(self._settings, self._state, self._now):
                yield self._publish(batch)

    def _next(self) -> float:
        """When the first of the devices is done with something; never, if all have left or wait for a version."""
        return self._queue[0][0] if self._queue else math.inf

    def _deadline(self) -> float:
        """When the buffer has waited long enough; never, if there is too little in it."""
        waiting = lpfl.averaged(self._settings, self._state, math.inf)
        return coordinator.since(waiting) + self._settings.deadline_seconds if waiting else math.inf

    def _go_on(self, device: _Device) -> None:
        """What the device did is over: carries out what its session says, until something takes time again."""
        event = self._came_of(device)
        while event is not None:
            device.session, action = session.step(device.session, event, float(device.rng.random()))
            match action:
                case session.Do(Train()):
                    if not device.gone:
                        self._after(training_seconds(self._fleet.delays, device.number, device.rng), device)
                    return
                case session.Send():
                    self._after(self._fleet.delays.communication if isinstance(device.outbox, tuple) else 0.0, device)
                    return
                case session.Sleep(seconds):
                    if isinstance(event, session.Assigned) and self._has_answered(device):
                        self._waiting.append((self._now, seconds, device.number))
                    else:
                        self._after(seconds, device)
                    return
                case session.AskForWork():
                    event = self._ask(device)
                case session.Do(Evaluate(version, _)):
                    device.outbox = Evaluation(device.id, version, 1, {})
                    event = session.Worked()
                case session.Do(Finished()):
                    event = session.Worked()
                case session.Drop():
                    device.outbox, event = None, session.Woke()
                case _:  # it stops
                    return

    def _came_of(self, device: _Device) -> session.Event | None:
        """The event that ends the action under way; None where the device is away for a while."""
        match device.session.doing:
            case _ if device.away:
                device.away = False
                return session.Started(pending=False)
            case session.Do(Train() as work):
                if device.rng.random() < self._fleet.dropout:
                    self._dropped, device.away = self._dropped + 1, True
                    self._after(self._fleet.away_seconds, device)
                    return None
                rng = np.random.default_rng((1, self._fleet.seed, device.number, work.version))
                learned = self._learn(work.version, device.start, device.number, rng)
                update = Update(device.id, work.version, learned.num_examples, learned.metrics)
                device.outbox = update, Contribution(learned.delta, learned.num_examples, 0, device.start)
                return session.Worked()
            case session.Send():
                return self._deliver(device)
            case _:
                return session.Woke()

    def _ask(self, device: _Device) -> session.Event:
        if self._is_lost(device):
            return session.NoAnswer()
        work = lpfl.plan(self._settings, self._state, self._state.devices[device.id], can_train=True)
        if isinstance(work, Train):
            oldest = lpfl.oldest(self._settings, self._state)
            if seconds := self._leases.take(device.id, work.version, oldest, self._now):
                return session.Assigned(Wait(pacing.until_free(seconds, self._settings.wait_seconds)))
            device.start = self._adapter
        return session.Assigned(work)

    def _has_answered(self, device: _Device) -> bool:
        """Whether it waits for a version; else for a place among those that train."""
        return self._state.devices[device.id].trained >= self._state.version

    def _deliver(self, device: _Device) -> session.Event:
        """The outbox's result reaches the server, or does not, or the receipt does not reach the device."""
        if self._is_lost(device):
            return session.NoAnswer()
        try:
            if isinstance(device.outbox, tuple):
                self._take(*device.outbox)
            elif device.outbox is not None:
                id = wire.update_id(device.id, device.outbox.version, "evaluation")
                self._record(coordinator.take(self._state, device.outbox, id))
        except WireError as error:
            return session.Rejected(error.code)
        if self._is_lost(device):
            return session.NoAnswer()
        device.outbox = None
        return session.Delivered()

    def _take(self, update: Update, contribution: Contribution) -> None:
        self._uploads += 1
        blob = f"{update.device}-{update.version}"
        id, size = wire.update_id(update.device, update.version, blob), sum(a.nbytes for a in contribution.delta.values())
        try:
            decision = coordinator.accept(self._state, update, id, blob, size, self._settings.max_staleness, self._now)
        except WireError:
            self._refused += 1
            raise
        self._leases.end(update.device, update.version)
        if not isinstance(decision, Receipt):
            self._accepted += 1
            self._blobs[blob] = update, contribution
            self._record(decision)

    def _publish(self, batch: Sequence[coordinator.Buffered]) -> Version:
        found = [self._blobs.pop(waiting.blob) for waiting in batch]
        buffer = [
            Contribution(c.delta, waiting.num_examples, self._state.version - waiting.version, c.base)
            for (_, c), waiting in zip(found, batch, strict=True)
        ]
        self._adapter = lpfl.step(self._settings, self._spec, self._adapter, buffer)
        number = self._state.version + 1
        self._record(Published(number, str(number), len(batch), at=self._now))
        for since, beat, device in self._waiting:
            beats = math.floor((self._now - since) / beat) + 1
            heapq.heappush(self._queue, (since + beats * beat, device))
        self._waiting.clear()
        return self._version([(update, c.staleness) for (update, _), c in zip(found, buffer, strict=True)])

    def _version(self, made_of: Sequence[tuple[Update, int]]) -> Version:
        return Version(
            self._state.version,
            self._now,
            self._adapter,
            tuple((int(update.device), update.version) for update, _ in made_of),
            Counter(staleness for _, staleness in made_of),
            _mean([update for update, _ in made_of]),
            self._uploads,
            self._accepted,
            len(self._state.buffer),
            self._refused,
            self._dropped,
        )

    def _record(self, event: coordinator.Event | Receipt | None) -> None:
        """An event of the run; a receipt or None changes nothing."""
        if event is not None and not isinstance(event, Receipt):
            self._state = coordinator.apply(self._state, event)

    def _after(self, seconds: float, device: _Device) -> None:
        heapq.heappush(self._queue, (self._now + seconds, device.number))

    def _is_lost(self, device: _Device) -> bool:
        return self._fleet.lost > 0 and float(device.rng.random()) < self._fleet.lost


def _mean(updates: Sequence[Update]) -> Metrics:
    """Each metric over the updates that have it, weighted by their examples."""
    names = dict.fromkeys(name for update in updates for name in update.metrics)
    having = {name: [u for u in updates if name in u.metrics] for name in names}
    return {
        name: sum(u.num_examples * u.metrics[name] for u in some) / sum(u.num_examples for u in some)
        for name, some in having.items()
    }
