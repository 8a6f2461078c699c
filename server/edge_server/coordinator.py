"""The run as a reducer: `apply(state, event) -> state`, and the decisions made on a state. No I/O, no clock, no torch.

Rules kept here and nowhere else:

1. An event is on disk before it is applied, and applied before it is answered; replaying the events gives the same state.
2. An update is named by its device, base version and bytes; sending it again gets the first receipt and changes nothing.
3. A device contributes at most one update per base version.
4. An update whose base is older than `max_staleness` versions is refused; one that has become so while it waited is dropped.
5. The next version is made from the oldest update of each of the `buffer_size` devices that have waited longest, or, where these
   have waited too long, of the `least` or more that are there; and from nothing else. So no device counts twice in a version.

`ledger.py` does the disk, `runs.py` says which system it is, and `systems/` what a device should do and how a version is made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

import msgspec
from immutables import Map

from edge_sdk.cohort import Advertise, Answer, Masked, Reveal, Shares, Terms
from edge_sdk.errors import WireError
from edge_sdk.protocol import (
    DeviceStatus,
    Evaluation,
    Judgment,
    Measurement,
    Metrics,
    Receipt,
    SheetStatus,
    Status,
    Trained,
    Update,
)
from edge_server import unmasking
from edge_server.unmasking import Cohort, Failed


class Enrolled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="enrolled"):
    device: str
    name: str
    model: str = ""


class Accepted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="accepted"):
    """An update whose bytes are the blob `blob` of `size` bytes; it came `at` so many seconds since the epoch."""

    id: str
    device: str
    version: int
    blob: str
    size: int
    num_examples: int
    metrics: Metrics
    at: float = 0.0


class Evaluated(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="evaluated"):
    id: str
    device: str
    version: int
    num_examples: int
    metrics: Metrics


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="published"):
    """Version `version` is the blob `adapter`, made from the first `folded` updates whose `turn` it was; the LLM that learned
    beside it has the adapter blob `llm`, "" where there is none. `at`: when that was, 0 where it was made from no update."""

    version: int
    adapter: str
    folded: int
    llm: str = ""
    at: float = 0.0


class Dropped(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="dropped"):
    """Updates that waited, by their blobs, will not count: they would be refused by now, with this code.

    That is `too-stale`, since newer versions were made meanwhile, or `revoked`.
    """

    blobs: tuple[str, ...]
    code: str


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="kept"):
    """A device trained on `version` and keeps what it learned to itself."""

    id: str
    device: str
    version: int
    num_examples: int
    metrics: Metrics


class Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="written"):
    """The LLM with the adapter blob `adapter` wrote sheet `sheet`: the blob `texts` for devices, `drafts` for the server."""

    sheet: int
    texts: str
    drafts: str
    size: int
    count: int
    adapter: str
    dropped: dict[str, int]
    at: float
    seconds: float = 0.0


class Judged(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="judged"):
    """A device's judgment of a sheet, the blob `blob` of `size` bytes."""

    id: str
    device: str
    sheet: int
    blob: str
    size: int
    num_examples: int
    metrics: Metrics


class Decided(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="decided"):
    """Sheet `sheet` is decided: the blob `judged` says what became of each text, `samples` of them go into the feed.

    That makes a version of the run: devices have something new to learn from.
    """

    sheet: int
    judged: str
    samples: int
    acceptance: float


class Tuned(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="tuned"):
    """The LLM learned from sheet `sheet`; its adapter is the blob `adapter`."""

    sheet: int
    adapter: str
    loss: float


class Withdrawn(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="withdrawn"):
    """A sample that shall not be used any more."""

    sample: str


class Opened(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="opened"):
    """A cohort was formed for secure averaging, in the place of one that failed, if there was any.

    Args:
        deadline: until when it waits for devices. seconds: for each later phase.
    """

    terms: Terms
    deadline: float
    seconds: float


class Answered(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="answered"):
    """A device of the cohort answered; a masked vector is the blob `blob` of `size` bytes."""

    answer: Answer
    blob: str
    size: int
    at: float


class Ticked(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ticked"):
    """A deadline of the cohort was over."""

    at: float


class Lost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="lost"):
    """The cohort's sum cannot be had: somebody lied."""

    reason: str


Averaging = Enrolled | Accepted | Evaluated | Published | Dropped | Kept
Writing = Written | Judged | Decided | Tuned | Withdrawn
Masking = Opened | Answered | Ticked | Lost
Event = Averaging | Writing | Masking


@dataclass(frozen=True)
class Buffered:
    """An accepted update of base version `version` that waits for its turn, since `at`."""

    blob: str
    device: str
    num_examples: int
    version: int
    at: float = 0.0


@dataclass(frozen=True)
class Device:
    """What the server remembers of a device; versions are -1 before the first."""

    name: str
    model: str = ""
    trained: int = -1
    evaluated: int = -1
    judged: int = -1
    updates: int = 0
    uploaded_bytes: int = 0


@dataclass(frozen=True)
class Ballot:
    """A judgment that was taken in."""

    device: str
    blob: str


@dataclass(frozen=True)
class Sheet:
    """Synthetic texts on their way: written, judged by these devices, and, once decided, part of the feed."""

    texts: str
    drafts: str
    size: int
    count: int
    adapter: str
    at: float
    ballots: tuple[Ballot, ...] = ()
    judged: str = ""
    samples: int = 0
    acceptance: float = 0.0


@dataclass(frozen=True)
class State:
    """The whole run; `version` is -1 until the first adapter is published, and `adapters` names that of every version.

    What grows with every event is in persistent maps, of which a changed copy costs as much as the change.

    Args:
        receipts: by update. measurements: by their number, from 0 on. sent: which device sent a blob, which no device may read.
        sheets: synthetic texts, in the order they were written.
        tuned: the LLM's adapters, one for each sheet it has learned from, or for each version made beside it.
        feed: what the feed of synthetic data is made of, in order: a decided sheet's number, or a withdrawn sample's id.
        cohort: of secure averaging, for the newest version. cohorts: how many there were. seconds: for its phases.
        keys: public keys of all cohorts that are over; none may come again.
    """

    version: int = -1
    adapters: tuple[str, ...] = ()
    buffer: tuple[Buffered, ...] = ()
    devices: Map[str, Device] = field(default_factory=Map)
    receipts: Map[str, Receipt] = field(default_factory=Map)
    measurements: Map[int, Measurement] = field(default_factory=Map)
    sent: Map[str, str] = field(default_factory=Map)
    sheets: tuple[Sheet, ...] = ()
    tuned: tuple[str, ...] = ()
    feed: tuple[int | str, ...] = ()
    cohort: unmasking.State | None = None
    cohorts: int = 0
    seconds: float = 0.0
    keys: frozenset[bytes] = frozenset()

    @property
    def lines(self) -> int:
        """Of the feed of synthetic data."""
        return sum(self.sheets[entry].samples if isinstance(entry, int) else 1 for entry in self.feed)

    @property
    def in_use(self) -> int:
        """Samples of the feed that are not withdrawn."""
        return sum(self.sheets[entry].samples if isinstance(entry, int) else -1 for entry in self.feed)

    @property
    def adapter(self) -> str:
        """The newest version's."""
        return self.adapters[-1] if self.adapters else ""


def apply(state: State, event: Event) -> State:
    """The state after `event`, which a decision below has allowed."""
    if isinstance(event, Averaging):
        return _after_averaging(state, event)
    return _after_writing(state, event) if isinstance(event, Writing) else _after_masking(state, event)


def _after_averaging(state: State, event: Averaging) -> State:
    match event:
        case Enrolled(device, name, model):
            known = state.devices.get(device)
            return _with_device(state, device, replace(known, name=name, model=model) if known else Device(name, model))
        case Accepted():
            return _after_update(state, event)
        case Evaluated():
            sender = state.devices[event.device]
            return _heard(state, "evaluation", event, replace(sender, evaluated=max(sender.evaluated, event.version)))
        case Kept():
            sender = state.devices[event.device]
            return _heard(state, "kept", event, replace(sender, trained=max(sender.trained, event.version)))
        case Published(version, adapter, folded, llm, at):
            tuned = (*state.tuned, llm) if llm else state.tuned
            state = replace(_with_cohort(state, None), version=version, adapters=(*state.adapters, adapter), tuned=tuned)
            return replace(state, buffer=_after_turn(state.buffer, folded, at))
        case Dropped(blobs):
            return replace(state, buffer=tuple(waiting for waiting in state.buffer if waiting.blob not in blobs))


def _after_update(state: State, event: Accepted) -> State:
    sender = state.devices[event.device]
    trained, uploaded = max(sender.trained, event.version), sender.uploaded_bytes + event.size
    sender = replace(sender, trained=trained, updates=sender.updates + 1, uploaded_bytes=uploaded)
    waiting = Buffered(event.blob, event.device, event.num_examples, event.version, event.at)
    state = replace(_heard(state, "update", event, sender), buffer=(*state.buffer, waiting))
    return _with_blob(state, event.device, event.blob)


def _after_turn(buffer: tuple[Buffered, ...], folded: int, at: float) -> tuple[Buffered, ...]:
    """What waits on. A device that had its turn waits anew, lest its next update makes a late version of its own at once."""
    done = {waiting.blob: waiting.device for waiting in turn(buffer)[:folded]}
    devices = set(done.values())
    rest = (waiting for waiting in buffer if waiting.blob not in done)
    return tuple(replace(waiting, at=max(waiting.at, at)) if waiting.device in devices else waiting for waiting in rest)


def _after_writing(state: State, event: Writing) -> State:
    match event:
        case Written():
            sheet = Sheet(event.texts, event.drafts, event.size, event.count, event.adapter, event.at)
            return replace(state, sheets=(*state.sheets, sheet))
        case Judged():
            sender, sheet = state.devices[event.device], state.sheets[event.sheet]
            judged, uploaded = max(sender.judged, event.sheet), sender.uploaded_bytes + event.size
            state = _heard(state, "judgment", event, replace(sender, judged=judged, uploaded_bytes=uploaded))
            state = _with_blob(state, event.device, event.blob)
            return _with_sheet(state, event.sheet, replace(sheet, ballots=(*sheet.ballots, Ballot(event.device, event.blob))))
        case Decided(number, judged, samples, acceptance):
            sheet = replace(state.sheets[number], judged=judged, samples=samples, acceptance=acceptance)
            adapters = (*state.adapters, state.adapter)  # what devices start from stays
            state = replace(state, feed=(*state.feed, number), version=state.version + 1, adapters=adapters)
            return _with_sheet(state, number, sheet)
        case Tuned(_, adapter, _):
            return replace(state, tuned=(*state.tuned, adapter))
        case Withdrawn(sample):
            return replace(state, feed=(*state.feed, sample))


def _after_masking(state: State, event: Masking) -> State:
    match event:
        case Opened(terms, deadline, seconds):
            state = replace(_with_cohort(state, None), cohorts=state.cohorts + 1, seconds=seconds)
            return replace(state, cohort=Cohort(terms, deadline))
        case Answered(said, blob, size, at):
            sender = state.devices[said.device]
            sender = replace(sender, uploaded_bytes=sender.uploaded_bytes + size, updates=sender.updates + bool(blob))
            state = _with_blob(state, said.device, blob) if blob else state
            cohort = _answered(_cohort(state), said, blob, state.keys)
            return _with_cohort(_with_device(state, said.device, sender), unmasking.advance(cohort, at, state.seconds))
        case Ticked(at):
            return _with_cohort(state, unmasking.advance(_cohort(state), at, state.seconds))
        case Lost(reason):
            return _with_cohort(state, Failed(_cohort(state).terms.cohort, reason, revealed=True))


def enroll(state: State, device: str, name: str, model: str = "") -> Enrolled | None:
    """The event of a first contact, a new name or another model; None where nothing changes.

    Raises:
        WireError: `bad-device`: the id is not 1 to 64 letters, digits or dashes, or the name is too long.
    """
    if not 1 <= len(device) <= 64 or not all(c.isascii() and (c.isalnum() or c == "-") for c in device):
        raise WireError("bad-device", "a device id is 1 to 64 letters, digits or dashes")
    if not 1 <= len(name) <= 64 or not name.isprintable():
        raise WireError("bad-device", "a device name is 1 to 64 printable characters")
    known = state.devices.get(device)
    return None if known is not None and (known.name, known.model) == (name, model) else Enrolled(device, name, model)


def known_device(state: State, device: str) -> Device:
    """Raises: WireError: `unknown-device`: it has not enrolled."""
    if device not in state.devices:
        raise WireError("unknown-device", "enroll this device first", 403)
    return state.devices[device]


def check_signer(device: str, signer: str | None) -> None:
    """Raises: WireError: `wrong-device`: `signer` signed a message of another device; None where nobody signs."""
    if signer not in (None, device):
        raise WireError("wrong-device", "the message names another device than the one that signed it", 403)


def is_private(state: State, blob: str) -> bool:
    """Whether a device has sent this blob. None of what devices read can be one: a sent one names its device inside."""
    return blob in state.sent


def accept(state: State, update: Update, id: str, blob: str, size: int, max_staleness: int, now: float) -> Accepted | Receipt:
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
    return Accepted(id, update.device, update.version, blob, size, update.num_examples, update.metrics, now)


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


def keep(state: State, trained: Trained, id: str) -> Kept | Receipt:
    """The event that records a training that stays on its device, or the receipt it already has.

    Raises:
        WireError: `unknown-device`, `unknown-version`, `already-answered`.
    """
    device = known_device(state, trained.device)
    if id in state.receipts:
        return state.receipts[id]
    _check_version(state, trained.version)
    if trained.version <= device.trained:
        raise WireError("already-answered", f"this device has already answered version {device.trained}; ask for work", 409)
    return Kept(id, trained.device, trained.version, trained.num_examples, trained.metrics)


def judge(state: State, judgment: Judgment, id: str, blob: str, size: int) -> Judged | Receipt:
    """The event that takes a judgment in, or the receipt it already has.

    Raises:
        WireError: `unknown-device`, `unknown-sheet`, `already-answered`, `too-stale` (the sheet is decided).
    """
    device = known_device(state, judgment.device)
    if id in state.receipts:
        return state.receipts[id]
    sheet = sheet_of(state, judgment.version)
    if judgment.version <= device.judged:
        raise WireError("already-answered", f"this device has already judged sheet {device.judged}; ask for work", 409)
    if sheet.judged:
        raise WireError("too-stale", f"sheet {judgment.version} is decided already; ask for work", 409)
    return Judged(id, judgment.device, judgment.version, blob, size, judgment.num_examples, judgment.metrics)


def answer(state: State, message: Answer, blob: str, size: int, now: float) -> Answered | None:
    """The event that takes in what a device of the cohort says; None where it has said so before.

    Raises:
        WireError: `unknown-device`, `no-cohort`, `cohort-failed`, or what `unmasking` refuses.
    """
    known_device(state, message.device)
    cohort = _cohort(state)
    return None if _answered(cohort, message, blob, state.keys) is cohort else Answered(message, blob, size, now)


def withdraw(state: State, sample: str, known: Collection[str]) -> Withdrawn | None:
    """The event that takes a sample out of use; None where it is out already.

    Args:
        known: ids of the samples of the feed, and of texts that are being judged.

    Raises:
        WireError: `unknown-sample`.
    """
    if sample in state.feed:
        return None
    if sample not in known:
        raise WireError("unknown-sample", "there is no such sample", 404)
    return Withdrawn(sample)


def sheet_of(state: State, number: int) -> Sheet:
    """Raises: WireError: `unknown-sheet`."""
    if not 0 <= number < len(state.sheets):
        raise WireError("unknown-sheet", f"there is no sheet {number}; {len(state.sheets)} have been written", 409)
    return state.sheets[number]


def turn(buffer: tuple[Buffered, ...]) -> tuple[Buffered, ...]:
    """The oldest update of each device, in the order they came: a device's next one waits until this has become a version."""
    first: dict[str, Buffered] = {}
    for waiting in buffer:
        first.setdefault(waiting.device, waiting)
    return tuple(first.values())


def due(state: State, buffer_size: int, least: int, deadline_seconds: float, now: float) -> tuple[Buffered, ...]:
    """The updates the next version is made from, of as many devices; empty while others are waited for.

    Args:
        buffer_size: how many are waited for.
        least: how many are enough once one has waited for `deadline_seconds`; 0 seconds for waiting without end.
        now: on the clock of `Buffered.at`.
    """
    waiting = turn(state.buffer)[:buffer_size]
    late = bool(waiting) and 0 < deadline_seconds <= now - since(waiting)
    return waiting if len(waiting) >= (least if late else buffer_size) else ()


def since(batch: Collection[Buffered]) -> float:
    """When the first of them began to wait."""
    return min(waiting.at for waiting in batch)


def outdated(state: State, max_staleness: int) -> Dropped | None:
    """The event that drops what has waited through too many versions; None where nothing has."""
    return _dropped((b for b in state.buffer if state.version - b.version > max_staleness), "too-stale")


def shut_out(batch: Collection[Buffered], revoked: Collection[str]) -> Dropped | None:
    """The event that drops the updates of revoked devices; None where there are none."""
    return _dropped((waiting for waiting in batch if waiting.device in revoked), "revoked")


def unheard(state: State, revoked: Collection[str]) -> State:
    """The state as if revoked devices had judged nothing: what an LLM is to learn from and decide by."""
    if not revoked:
        return state
    sheets = (replace(s, ballots=tuple(b for b in s.ballots if b.device not in revoked)) for s in state.sheets)
    return replace(state, sheets=tuple(sheets))


def _dropped(gone: Iterable[Buffered], code: str) -> Dropped | None:
    blobs = tuple(waiting.blob for waiting in gone)
    return Dropped(blobs, code) if blobs else None


def status(state: State, system: str, finished: bool) -> Status:
    """The run as an operator sees it."""
    known = sorted(state.devices.items(), key=lambda item: (item[1].name, item[0]))
    devices = tuple(DeviceStatus(id, d.name, d.updates, d.uploaded_bytes) for id, d in known)
    measured = tuple(state.measurements[i] for i in range(len(state.measurements)))
    sheets = tuple(
        SheetStatus(s.count, len(s.ballots), s.samples if s.judged else -1, s.acceptance if s.judged else -1.0)
        for s in state.sheets
    )
    return Status(system, state.version, state.adapter, len(state.buffer), finished, devices, measured, sheets, state.adapters)


def _cohort(state: State) -> Cohort:
    if state.cohort is None:
        raise WireError("no-cohort", "no cohort is under way; ask for work", 409)
    return unmasking.current(state.cohort)


def _answered(cohort: Cohort, message: Answer, blob: str, keys: Collection[bytes]) -> Cohort:
    """The cohort with one more answer; itself where it was there already."""
    match message:
        case Advertise():
            return unmasking.advertise(cohort, message, keys)
        case Shares():
            return unmasking.take_shares(cohort, message)
        case Masked():
            return unmasking.take_masked(cohort, message, blob)
        case Reveal():
            return unmasking.take_reveal(cohort, message)


def _with_cohort(state: State, cohort: unmasking.State | None) -> State:
    """Keys of one that is over are kept, so that they never come again."""
    if isinstance(state.cohort, Cohort) and not isinstance(cohort, Cohort):
        adverts = state.cohort.adverts.values()
        state = replace(state, keys=state.keys | {key for a in adverts for key in (a.cipher_key, a.mask_key)})
    return replace(state, cohort=cohort)


def _check_version(state: State, version: int) -> None:
    if not 0 <= version <= state.version:
        raise WireError("unknown-version", f"there is no version {version}; the newest is {state.version}", 409)


def _with_device(state: State, id: str, device: Device) -> State:
    return replace(state, devices=state.devices.set(id, device))


def _with_blob(state: State, device: str, blob: str) -> State:
    return replace(state, sent=state.sent.set(blob, device))


def _with_sheet(state: State, number: int, sheet: Sheet) -> State:
    return replace(state, sheets=(*state.sheets[:number], sheet, *state.sheets[number + 1 :]))


def _heard(state: State, kind: str, event: Accepted | Evaluated | Kept | Judged, sender: Device) -> State:
    """With what a device has sent: the sender as it is now, a receipt, and what was measured."""
    version = event.sheet if isinstance(event, Judged) else event.version
    measured = Measurement(kind, event.device, version, event.num_examples, event.metrics)
    return replace(
        _with_device(state, event.device, sender),
        receipts=state.receipts.set(event.id, Receipt(event.id, state.version)),
        measurements=state.measurements.set(len(state.measurements), measured),
    )
