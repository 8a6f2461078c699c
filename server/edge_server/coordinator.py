"""The run as a reducer: `apply(state, event) -> state`, and the decisions made on a state. No I/O, no clock, no torch.

Rules kept here and nowhere else:

1. An event is on disk before it is applied, and applied before it is answered; replaying the events gives the same state.
2. An update is named by its device, base version and bytes; sending it again gets the first receipt and changes nothing.
3. A device contributes at most one update per base version.
4. An update whose base is older than `max_staleness` versions is refused.
5. The next version is made from the `buffer_size` oldest updates of the buffer, and from nothing else.

`ledger.py` does the disk, `systems/` say what a device should do and how a version is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import msgspec

from edge_sdk.errors import WireError
from edge_sdk.protocol import DeviceStatus, Evaluation, Measurement, Metrics, Receipt, Status, Update


class Enrolled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="enrolled"):
    device: str
    name: str


class Accepted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="accepted"):
    """An update whose bytes are the blob `blob` of `size` bytes."""

    id: str
    device: str
    version: int
    blob: str
    size: int
    num_examples: int
    metrics: Metrics


class Evaluated(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="evaluated"):
    id: str
    device: str
    version: int
    num_examples: int
    metrics: Metrics


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="published"):
    """Version `version` is the blob `adapter`, made from the `folded` oldest updates of the buffer."""

    version: int
    adapter: str
    folded: int


Event = Enrolled | Accepted | Evaluated | Published


@dataclass(frozen=True)
class Buffered:
    """An accepted update of base version `version` that waits for the next one; staleness as it was on arrival."""

    blob: str
    num_examples: int
    staleness: int
    version: int


@dataclass(frozen=True)
class Device:
    """What the server remembers of a device; versions are -1 before the first."""

    name: str
    trained: int = -1
    evaluated: int = -1
    updates: int = 0
    uploaded_bytes: int = 0


@dataclass(frozen=True)
class State:
    """The whole run; `version` is -1 until the first adapter is published, and `adapters` names that of every version."""

    version: int = -1
    adapters: tuple[str, ...] = ()
    buffer: tuple[Buffered, ...] = ()
    devices: Mapping[str, Device] = field(default_factory=lambda: MappingProxyType({}))
    receipts: Mapping[str, Receipt] = field(default_factory=lambda: MappingProxyType({}))
    measurements: tuple[Measurement, ...] = ()

    @property
    def adapter(self) -> str:
        """The newest version's."""
        return self.adapters[-1] if self.adapters else ""


def apply(state: State, event: Event) -> State:
    """The state after `event`, which a decision below has allowed."""
    match event:
        case Enrolled(device, name):
            known = state.devices.get(device)
            return _with_device(state, device, replace(known, name=name) if known else Device(name))
        case Accepted():
            sender = state.devices[event.device]
            state = _with_device(
                state,
                event.device,
                replace(
                    sender,
                    trained=max(sender.trained, event.version),
                    updates=sender.updates + 1,
                    uploaded_bytes=sender.uploaded_bytes + event.size,
                ),
            )
            waiting = Buffered(event.blob, event.num_examples, state.version - event.version, event.version)
            return replace(_with_receipt(state, "update", event), buffer=(*state.buffer, waiting))
        case Evaluated():
            sender = state.devices[event.device]
            state = _with_device(state, event.device, replace(sender, evaluated=max(sender.evaluated, event.version)))
            return _with_receipt(state, "evaluation", event)
        case Published(version, adapter, folded):
            return replace(state, version=version, adapters=(*state.adapters, adapter), buffer=state.buffer[folded:])


def enroll(state: State, device: str, name: str) -> Enrolled | None:
    """The event of a first contact or a new name; None where nothing changes.

    Raises:
        WireError: `bad-device`: the id is not 1 to 64 letters, digits or dashes, or the name is too long.
    """
    if not 1 <= len(device) <= 64 or not all(c.isascii() and (c.isalnum() or c == "-") for c in device):
        raise WireError("bad-device", "a device id is 1 to 64 letters, digits or dashes")
    if not 1 <= len(name) <= 64 or not name.isprintable():
        raise WireError("bad-device", "a device name is 1 to 64 printable characters")
    known = state.devices.get(device)
    return None if known is not None and known.name == name else Enrolled(device, name)


def known_device(state: State, device: str) -> Device:
    """Raises: WireError: `unknown-device`: it has not enrolled."""
    if device not in state.devices:
        raise WireError("unknown-device", "enroll this device first", 403)
    return state.devices[device]


def accept(state: State, update: Update, id: str, blob: str, size: int, max_staleness: int) -> Accepted | Receipt:
    """The event that takes an update in, or the receipt it already has.

    Raises:
        WireError: `unknown-device`, `unknown-version`, `already-answered`, `too-stale`.
    """
    device = known_device(state, update.device)
    if id in state.receipts:
        return state.receipts[id]
    _check_version(state, update.version)
    if update.version <= device.trained:
        raise WireError("already-answered", f"this device has already answered version {device.trained}; ask for work", 409)
    if state.version - update.version > max_staleness:
        raise WireError(
            "too-stale", f"version {update.version} is over {max_staleness} behind {state.version}; ask for work", 409
        )
    return Accepted(id, update.device, update.version, blob, size, update.num_examples, update.metrics)


def take(state: State, evaluation: Evaluation, id: str) -> Evaluated | Receipt:
    """The event that records an evaluation, or the receipt it already has.

    Raises:
        WireError: `unknown-device`, `unknown-version`, `already-answered`.
    """
    device = known_device(state, evaluation.device)
    if id in state.receipts:
        return state.receipts[id]
    _check_version(state, evaluation.version)
    if evaluation.version <= device.evaluated:
        raise WireError("already-answered", f"this device has already measured version {device.evaluated}; ask for work", 409)
    return Evaluated(id, evaluation.device, evaluation.version, evaluation.num_examples, evaluation.metrics)


def due(state: State, buffer_size: int) -> tuple[Buffered, ...]:
    """The updates the next version is made from; empty while the buffer is not full."""
    return state.buffer[:buffer_size] if len(state.buffer) >= buffer_size else ()


def status(state: State, system: str, finished: bool) -> Status:
    """The run as an operator sees it."""
    devices = tuple(DeviceStatus(id, d.name, d.updates, d.uploaded_bytes) for id, d in state.devices.items())
    return Status(system, state.version, state.adapter, len(state.buffer), finished, devices, state.measurements)


def _check_version(state: State, version: int) -> None:
    if not 0 <= version <= state.version:
        raise WireError("unknown-version", f"there is no version {version}; the newest is {state.version}", 409)


def _with_device(state: State, id: str, device: Device) -> State:
    return replace(state, devices=MappingProxyType({**state.devices, id: device}))


def _with_receipt(state: State, kind: str, event: Accepted | Evaluated) -> State:
    measured = Measurement(kind, event.device, event.version, event.num_examples, event.metrics)
    return replace(
        state,
        receipts=MappingProxyType({**state.receipts, event.id: Receipt(event.id, state.version)}),
        measurements=(*state.measurements, measured),
    )
