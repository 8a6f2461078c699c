"""The reducer's rules, each by example, and all of them for any sequence of requests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import WireError
from edge_sdk.protocol import DeviceStatus, Evaluation, Judgment, Measurement, Receipt, SheetStatus, Status, Trained, Update
from edge_server import coordinator
from edge_server.coordinator import (
    Accepted,
    Ballot,
    Buffered,
    Decided,
    Device,
    Enrolled,
    Evaluated,
    Event,
    Judged,
    Kept,
    Published,
    Sheet,
    State,
    Tuned,
    Withdrawn,
    Written,
    apply,
)
from tests import strategies

MAX_STALENESS = 2
BUFFER_SIZE = 3


def replay(*events: Event) -> State:
    return functools.reduce(apply, events, State())


def through_json(event: Event) -> Event:
    decoded: Event = msgspec.json.decode(msgspec.json.encode(event), type=Event)
    return decoded


def accepted(id: str, device: str, version: int, num_examples: int = 10, size: int = 100) -> Accepted:
    return Accepted(id, device, version, f"blob-{id}", size, num_examples, {"loss": 0.5})


def update(device: str, version: int) -> Update:
    return Update(device, version, 10, {"loss": 0.5})


def evaluation(device: str, version: int) -> Evaluation:
    return Evaluation(device, version, 20, {"accuracy": 0.75})


def accept(state: State, message: Update, id: str = "new", max_staleness: int = MAX_STALENESS) -> Accepted | Receipt:
    return coordinator.accept(state, message, id, f"blob-{id}", 100, max_staleness)


def code(call: Callable[[], object]) -> tuple[str, int]:
    """The code and the status a request is refused with."""
    with pytest.raises(WireError) as refused:
        call()
    return refused.value.code, refused.value.status


AT_0_EVENTS: tuple[Event, ...] = (Published(0, "a0", 0), Enrolled("d1", "one"), Enrolled("d2", "two"))
AT_0 = replay(*AT_0_EVENTS)
AT_3_EVENTS: tuple[Event, ...] = (*(Published(version, f"a{version}", 0) for version in range(4)), *AT_0_EVENTS[1:])
AT_3 = replay(*AT_3_EVENTS)


def test_a_fresh_run_has_nothing() -> None:
    """Before the first event there is no version, no device and no update."""
    assert State() == State(-1, (), (), {}, {}, ())


def test_an_accepted_update_waits_for_the_next_version() -> None:
    """Accepting remembers the receipt, the numbers and the bytes of the sender, and changes no version."""
    state = apply(AT_0, accepted("u1", "d1", 0, num_examples=7, size=123))

    assert (state.version, state.adapter) == (0, "a0")
    assert state.buffer == (Buffered("blob-u1", 7, 0, 0),)
    assert state.devices == {"d1": Device("one", trained=0, updates=1, uploaded_bytes=123), "d2": Device("two")}
    assert state.receipts == {"u1": Receipt("u1", 0)}
    assert state.measurements == (Measurement("update", "d1", 0, 7, {"loss": 0.5}),)


def test_a_receipt_tells_the_newest_version() -> None:
    """A device that is behind learns from its receipt how far the server is."""
    state = replay(*AT_3_EVENTS, accepted("u1", "d1", 1), Evaluated("e1", "d1", 2, 20, {}))

    assert state.receipts == {"u1": Receipt("u1", 3), "e1": Receipt("e1", 3)}


def test_updates_and_bytes_of_a_device_add_up() -> None:
    """An operator sees what a device has cost so far, not what it cost last."""
    state = replay(*AT_3_EVENTS, accepted("u1", "d1", 1, size=100), accepted("u2", "d1", 3, size=20))

    assert state.devices["d1"] == Device("one", trained=3, updates=2, uploaded_bytes=120)


def test_an_evaluation_joins_no_buffer() -> None:
    """An evaluation is remembered as numbers and makes no version."""
    state = apply(AT_0, Evaluated("e1", "d2", 0, 20, {"accuracy": 0.75}))

    assert state.buffer == ()
    assert state.devices["d2"] == Device("two", evaluated=0)
    assert state.measurements == (Measurement("evaluation", "d2", 0, 20, {"accuracy": 0.75}),)


def test_apply_leaves_the_old_state_alone() -> None:
    """A state is a value: whoever holds one sees no later event in it."""
    before = (AT_0.version, AT_0.buffer, dict(AT_0.devices), dict(AT_0.receipts), AT_0.measurements)
    apply(AT_0, accepted("u1", "d1", 0))

    assert before == (AT_0.version, AT_0.buffer, dict(AT_0.devices), dict(AT_0.receipts), AT_0.measurements)


def test_a_new_version_takes_the_oldest_updates() -> None:
    """Rule 5: what was folded leaves the front of the buffer, the rest keeps its order and its staleness."""
    full = replay(
        Published(0, "a0", 0), *(Enrolled(f"d{i}", "x") for i in range(4)), *(accepted(f"u{i}", f"d{i}", 0) for i in range(4))
    )
    state = apply(full, Published(1, "a1", 3))

    assert [b.blob for b in coordinator.due(full, 3)] == ["blob-u0", "blob-u1", "blob-u2"]
    assert (state.version, state.adapter, state.buffer) == (1, "a1", (Buffered("blob-u3", 10, 0, 0),))


def test_nothing_is_due_before_the_buffer_is_full() -> None:
    """Two updates of three make no version; three do."""
    two = replay(*AT_0_EVENTS, accepted("u1", "d1", 0), accepted("u2", "d2", 0))

    assert coordinator.due(two, 3) == ()
    assert coordinator.due(two, 2) == two.buffer


def test_staleness_is_computed_on_arrival() -> None:
    """An update that waits through a new version does not age in the buffer."""
    arrived = apply(AT_3, accepted("u1", "d1", 1))
    later = apply(arrived, Published(4, "a4", 0))

    assert arrived.buffer == later.buffer == (Buffered("blob-u1", 10, 2, 1),)


def test_a_repeated_update_gets_its_first_receipt() -> None:
    """Rule 2: the receipt is the first one, also versions later, when a new update would be refused."""
    state = replay(
        Published(0, "a0", 0), Enrolled("d1", "one"), accepted("u1", "d1", 0), *(Published(v, f"a{v}", 0) for v in range(1, 9))
    )

    assert accept(state, update("d1", 0), "u1") == Receipt("u1", 0)


def test_a_repeated_evaluation_gets_its_first_receipt() -> None:
    """Rule 2 holds for evaluations."""
    state = replay(Published(0, "a0", 0), Enrolled("d1", "one"), Evaluated("e1", "d1", 0, 20, {}), Published(1, "a1", 0))

    assert coordinator.take(state, evaluation("d1", 0), "e1") == Receipt("e1", 0)


def test_a_second_update_for_one_version_is_refused() -> None:
    """Rule 3: a device counts once for a base version, and cannot go back to an older one."""
    state = apply(AT_3, accepted("u1", "d1", 2))

    assert code(lambda: accept(state, update("d1", 2))) == ("already-answered", 409)
    assert code(lambda: accept(state, update("d1", 1))) == ("already-answered", 409)
    assert accept(state, update("d1", 3)) == accepted("new", "d1", 3)
    assert accept(state, update("d2", 2)) == accepted("new", "d2", 2)


def test_a_second_evaluation_of_one_version_is_refused() -> None:
    """A device measures a version once; training and measuring do not get in each other's way."""
    state = apply(AT_3, Evaluated("e1", "d1", 2, 20, {}))

    assert code(lambda: coordinator.take(state, evaluation("d1", 2), "e2")) == ("already-answered", 409)
    assert code(lambda: coordinator.take(state, evaluation("d1", 0), "e2")) == ("already-answered", 409)
    assert coordinator.take(state, evaluation("d1", 3), "e2") == Evaluated("e2", "d1", 3, 20, {"accuracy": 0.75})
    assert accept(state, update("d1", 2)) == accepted("new", "d1", 2)


def test_an_update_too_far_behind_is_refused() -> None:
    """Rule 4: exactly `max_staleness` behind is taken, one more is not."""
    assert accept(AT_3, update("d1", 1), max_staleness=2) == accepted("new", "d1", 1)
    assert code(lambda: accept(AT_3, update("d1", 0), max_staleness=2)) == ("too-stale", 409)
    assert code(lambda: accept(AT_3, update("d1", 2), max_staleness=0)) == ("too-stale", 409)


@pytest.mark.parametrize("version", [-1, 4, 10**30])
def test_a_version_that_never_was_is_refused(version: int) -> None:
    """Only published versions can be trained from or measured."""
    assert code(lambda: accept(AT_3, update("d1", version))) == ("unknown-version", 409)
    assert code(lambda: coordinator.take(AT_3, evaluation("d1", version), "e1")) == ("unknown-version", 409)


def test_nothing_is_taken_before_version_0() -> None:
    """A server that has published nothing knows no version at all, not even the one it is at."""
    state = replay(Enrolled("d1", "one"))

    assert code(lambda: accept(state, update("d1", -1))) == ("unknown-version", 409)
    assert code(lambda: accept(state, update("d1", 0))) == ("unknown-version", 409)


def test_a_stranger_is_refused() -> None:
    """A device that has not enrolled can do nothing, not even fetch a receipt."""
    state = replay(Published(0, "a0", 0), Enrolled("d1", "one"), accepted("u1", "d1", 0))

    assert code(lambda: accept(state, update("d9", 0), "u1")) == ("unknown-device", 403)
    assert code(lambda: coordinator.take(state, evaluation("d9", 0), "u1")) == ("unknown-device", 403)
    assert code(lambda: coordinator.known_device(state, "d9")) == ("unknown-device", 403)


@pytest.mark.parametrize("device", ["d", "d" * 64, "0b5f-2A"])
def test_a_device_id_is_up_to_64_letters_digits_and_dashes(device: str) -> None:
    """Good ids are taken as they are."""
    assert coordinator.enroll(AT_0, device, "name") == Enrolled(device, "name")


@pytest.mark.parametrize("device", ["", "d" * 65, "a b", "a/b", "a.b", "a_b", "é", "\u0661", "a\n"])
def test_any_other_device_id_is_refused(device: str) -> None:
    """Ids that are empty, long, or hold anything but ASCII letters, digits and dashes are refused."""
    assert code(lambda: coordinator.enroll(AT_0, device, "name")) == ("bad-device", 400)


@pytest.mark.parametrize("name", ["", "n" * 65, "a\nb", "\x1b[31m", "\u202e"])
def test_a_name_an_operator_cannot_read_is_refused(name: str) -> None:
    """Names reach a terminal: control characters, nothing, or a flood of letters are refused."""
    assert code(lambda: coordinator.enroll(AT_0, "d3", name)) == ("bad-device", 400)


def test_enrolling_again_changes_nothing() -> None:
    """The same id and name make no event."""
    assert coordinator.enroll(AT_0, "d1", "one") is None


def test_a_new_name_keeps_the_past() -> None:
    """A device may rename itself without losing its counts."""
    state = apply(AT_0, accepted("u1", "d1", 0))
    event = coordinator.enroll(state, "d1", "uno")

    assert event == Enrolled("d1", "uno")
    assert apply(state, event).devices["d1"] == replace(state.devices["d1"], name="uno")


def test_status_is_the_state_as_an_operator_sees_it() -> None:
    """Devices in order of enrolment, counts and every measurement."""
    state = replay(Published(0, "a0", 0), Enrolled("d2", "two"), Enrolled("d1", "one"), accepted("u1", "d1", 0))

    assert coordinator.status(state, "lpfl", False) == Status(
        "lpfl",
        0,
        "a0",
        1,
        False,
        (DeviceStatus("d2", "two", 0, 0), DeviceStatus("d1", "one", 1, 100)),
        (Measurement("update", "d1", 0, 10, {"loss": 0.5}),),
    )


# A run with an LLM ----------------------------------------------------------------------------------------------------
def written(sheet: int, count: int = 4) -> Written:
    return Written(sheet, f"texts{sheet}", f"drafts{sheet}", 100 + sheet, count, f"llm{sheet}", {"short": 1}, 50.0 + sheet)


def judged(id: str, device: str, sheet: int, size: int = 30) -> Judged:
    return Judged(id, device, sheet, f"blob-{id}", size, 10, {"accuracy": 0.75})


def judgment(device: str, sheet: int) -> Judgment:
    return Judgment(device, sheet, 10, {"accuracy": 0.75})


def trained(device: str, version: int) -> Trained:
    return Trained(device, version, 10, {"loss": 0.5})


def judge(state: State, message: Judgment, id: str = "new") -> Judged | Receipt:
    return coordinator.judge(state, message, id, f"blob-{id}", 30)


DECIDED_EVENTS: tuple[Event, ...] = (*AT_0_EVENTS, written(0), judged("j1", "d1", 0), Decided(0, "judged0", 3, 0.75))
DECIDED = replay(*DECIDED_EVENTS)


def test_a_training_that_stays_is_counted() -> None:
    """The device has answered the version, its numbers are kept; nothing waits to be averaged."""
    state = apply(AT_0, Kept("k1", "d1", 0, 7, {"loss": 0.5}))

    assert state == replace(
        AT_0,
        devices={**AT_0.devices, "d1": Device("one", trained=0)},
        receipts={"k1": Receipt("k1", 0)},
        measurements=(Measurement("kept", "d1", 0, 7, {"loss": 0.5}),),
    )


def test_a_written_sheet_is_open() -> None:
    """It knows its blobs and who wrote it, and nobody has judged it; the version stays."""
    state = apply(AT_0, written(0))

    assert state == replace(AT_0, sheets=(Sheet("texts0", "drafts0", 100, 4, "llm0", 50.0),))
    assert (state.sheets[0].ballots, state.sheets[0].judged, state.lines) == ((), "", 0)


def test_a_judgment_is_a_ballot_of_its_sheet() -> None:
    """Sheet, device and receipt remember it, in order of arrival; the measurement names the sheet."""
    state = replay(*AT_0_EVENTS, written(0), judged("j2", "d2", 0, size=20), judged("j1", "d1", 0, size=30))

    assert state.sheets[0].ballots == (Ballot("d2", "blob-j2"), Ballot("d1", "blob-j1"))
    assert state.devices == {
        "d1": Device("one", judged=0, uploaded_bytes=30),
        "d2": Device("two", judged=0, uploaded_bytes=20),
    }
    assert state.receipts == {"j2": Receipt("j2", 0), "j1": Receipt("j1", 0)}
    assert state.measurements[1] == Measurement("judgment", "d1", 0, 10, {"accuracy": 0.75})


def test_a_decision_makes_a_version() -> None:
    """The sheet joins the feed, and devices start from the same adapter again."""
    assert (DECIDED.version, DECIDED.adapters, DECIDED.feed, DECIDED.lines) == (1, ("a0", "a0"), (0,), 3)
    assert DECIDED.sheets == (Sheet("texts0", "drafts0", 100, 4, "llm0", 50.0, (Ballot("d1", "blob-j1"),), "judged0", 3, 0.75),)


def test_what_the_llm_learned_is_the_next_adapter() -> None:
    """Tuning changes nothing but the list of the LLM's adapters."""
    assert apply(DECIDED, Tuned(0, "llm1", 0.5)) == replace(DECIDED, tuned=("llm1",))
    assert replay(Tuned(0, "a", 1.0), Tuned(1, "b", 0.5)).tuned == ("a", "b")


def test_a_withdrawal_is_a_line_of_the_feed() -> None:
    """It comes after what there was, and before what comes."""
    state = replay(*DECIDED_EVENTS, Withdrawn("0-a"), written(1), Decided(1, "judged1", 2, 0.5))

    assert state.feed == (0, "0-a", 1)
    assert state.lines == 3 + 1 + 2
    assert state.version == 2


def test_a_training_that_stays_follows_the_rules_of_an_update() -> None:
    """First receipt again, one for each version, of versions that are; the event has what the message says."""
    state = replay(*DECIDED_EVENTS, Kept("k1", "d1", 0, 10, {}))

    assert coordinator.keep(state, trained("d1", 0), "k1") == Receipt("k1", 1)
    assert coordinator.keep(state, trained("d1", 1), "k2") == Kept("k2", "d1", 1, 10, {"loss": 0.5})
    assert code(lambda: coordinator.keep(state, trained("d1", 0), "k2")) == ("already-answered", 409)
    assert code(lambda: coordinator.keep(state, trained("d1", 2), "k2")) == ("unknown-version", 409)
    assert code(lambda: coordinator.keep(state, trained("d9", 0), "k1")) == ("unknown-device", 403)


def test_a_judgment_is_taken_once() -> None:
    """The same bytes get their first receipt, also when the sheet is decided; other bytes are refused."""
    judging = replay(*AT_0_EVENTS, written(0), judged("j1", "d1", 0))

    assert judge(judging, judgment("d2", 0)) == Judged("new", "d2", 0, "blob-new", 30, 10, {"accuracy": 0.75})
    assert judge(judging, judgment("d1", 0), "j1") == judge(DECIDED, judgment("d1", 0), "j1") == Receipt("j1", 0)
    assert code(lambda: judge(judging, judgment("d1", 0))) == ("already-answered", 409)


def test_a_judgment_that_helps_nobody_is_refused() -> None:
    """A decided sheet, one that is not written, and a stranger each have their code."""
    assert code(lambda: judge(DECIDED, judgment("d2", 0))) == ("too-stale", 409)
    assert code(lambda: judge(DECIDED, judgment("d9", 0), "j1")) == ("unknown-device", 403)
    for sheet in (-1, 1, 10**30):
        assert code(lambda sheet=sheet: judge(DECIDED, judgment("d2", sheet))) == ("unknown-sheet", 409)  # type: ignore[misc]
    assert coordinator.sheet_of(DECIDED, 0) is DECIDED.sheets[0]


def test_a_sample_is_withdrawn_once() -> None:
    """A known sample makes an event, a second wish none, an unknown one is refused."""
    assert coordinator.withdraw(DECIDED, "0-a", {"0-a", "0-b"}) == Withdrawn("0-a")
    assert coordinator.withdraw(apply(DECIDED, Withdrawn("0-a")), "0-a", {"0-a"}) is None
    assert code(lambda: coordinator.withdraw(DECIDED, "0-c", {"0-a", "0-b"})) == ("unknown-sample", 404)


def test_status_tells_of_sheets() -> None:
    """What was written, judged and accepted; -1 while that is open."""
    state = replay(*DECIDED_EVENTS, written(1, count=9), judged("j2", "d2", 1))

    assert coordinator.status(state, "crosslm", False).sheets == (SheetStatus(4, 1, 3, 0.75), SheetStatus(9, 1, -1, -1.0))


# Any sequence ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Enroll:
    device: str
    name: str


@dataclass(frozen=True)
class Send:
    """A result for the version `behind` the newest; `body` tells two results for one version apart."""

    kind: str
    device: str
    behind: int
    body: int


@dataclass(frozen=True)
class Publish:
    """The version maker looks whether there is something to do."""


requests = st.one_of(
    st.builds(Enroll, st.sampled_from(["a", "b", "c", "d", "not an id"]), st.sampled_from(["x", "y", ""])),
    st.builds(
        Send,
        st.sampled_from(["update", "update", "update", "evaluation"]),
        st.sampled_from(["a", "b", "c", "d", "stranger"]),
        st.sampled_from([0, 0, 0, 0, 1, 2, 3, -1]),
        st.integers(0, 1),
    ),
    st.just(Publish()),
)
everybody = [Enroll(device, "x") for device in "abcd"]
sequences = st.lists(requests, min_size=1, max_size=60).flatmap(
    lambda tail: st.sampled_from([[Publish(), *everybody, *tail], [Publish(), *tail], tail])
)


@dataclass
class Run:
    """What a ledger does, without a disk, beside a bookkeeper that knows nothing of `State`."""

    state: State = field(default_factory=State)
    events: list[Event] = field(default_factory=list)
    answers: dict[str, list[Receipt]] = field(default_factory=dict)
    waiting: list[tuple[str, int]] = field(default_factory=list)  # blob and staleness, oldest first
    folded: list[str] = field(default_factory=list)

    def handle(self, request: object) -> None:
        match request:
            case Enroll(device, name):
                if event := coordinator.enroll(self.state, device, name):
                    self._record(event)
            case Send(kind, device, behind, body):
                version = self.state.version - behind
                id = f"{kind} {body} of {device} for {version}"
                decision = (
                    accept(self.state, update(device, version), id)
                    if kind == "update"
                    else coordinator.take(self.state, evaluation(device, version), id)
                )
                if not isinstance(decision, Receipt):
                    self._record(decision)
                    if kind == "update":
                        self.waiting.append((f"blob-{id}", behind))
                self.answers.setdefault(id, []).append(self.state.receipts[id])
            case Publish() if self.state.version < 0:
                self._record(Published(0, "a0", 0))
            case Publish():
                while batch := coordinator.due(self.state, BUFFER_SIZE):
                    version = self.state.version + 1
                    self._record(Published(version, f"a{version}", len(batch)))
                    self.folded += [buffered.blob for buffered in batch]
                    del self.waiting[: len(batch)]

    def _record(self, event: Event) -> None:
        self.events.append(event)
        self.state = apply(self.state, event)


def run(sequence: list[object]) -> Run:
    made = Run()
    for request in sequence:
        try:
            made.handle(request)
        except WireError as error:
            if error.code not in {"bad-device", "unknown-device", "unknown-version", "already-answered", "too-stale"}:
                raise
    return made


@strategies.fuzzing
@given(sequences)
def test_replaying_the_events_gives_the_same_state(sequence: list[object]) -> None:
    """Rule 1: the events on disk are the whole state, also after a round trip through JSON."""
    made = run(sequence)

    assert replay(*made.events) == made.state
    assert [through_json(event) for event in made.events] == made.events
    assert replay(*map(through_json, made.events)) == made.state


@strategies.fuzzing
@given(sequences)
def test_every_answer_to_one_result_is_the_first_receipt(sequence: list[object]) -> None:
    """Rule 2: however often and whenever a result is sent, it is recorded once and answered alike."""
    made = run(sequence)
    recorded = [event.id for event in made.events if isinstance(event, Accepted | Evaluated)]

    assert len(recorded) == len(set(recorded))
    assert set(recorded) == set(made.answers)
    assert all(receipts == [made.state.receipts[id]] * len(receipts) for id, receipts in made.answers.items())


@strategies.fuzzing
@given(sequences)
def test_no_device_has_two_updates_for_one_version(sequence: list[object]) -> None:
    """Rule 3: nobody counts twice in what a version learns from another."""
    made = run(sequence)
    pairs = [(event.device, event.version) for event in made.events if isinstance(event, Accepted)]
    counts = {id: device.updates for id, device in made.state.devices.items()}

    assert len(pairs) == len(set(pairs))
    assert counts == {id: sum(device == id for device, _ in pairs) for id in made.state.devices}


@strategies.fuzzing
@given(sequences)
def test_staleness_is_bounded_and_kept(sequence: list[object]) -> None:
    """Rule 4: the buffer holds, in order of arrival, what the bookkeeper wrote down then, and nothing too old."""
    made = run(sequence)

    assert [(buffered.blob, buffered.staleness) for buffered in made.state.buffer] == made.waiting
    assert all(0 <= buffered.staleness <= MAX_STALENESS for buffered in made.state.buffer)


@strategies.fuzzing
@given(sequences)
def test_every_update_is_folded_once_in_order_of_arrival(sequence: list[object]) -> None:
    """Rule 5: versions eat the updates in order of arrival, three at a time, and leave the rest."""
    made = run(sequence)
    arrived = [event.blob for event in made.events if isinstance(event, Accepted)]

    assert made.folded + [buffered.blob for buffered in made.state.buffer] == arrived
    assert len(made.folded) == BUFFER_SIZE * max(made.state.version, 0)


# Any sequence of a run with an LLM ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Answer:
    """A device's training or judgment of the version or sheet `behind` the newest."""

    kind: str
    device: str
    behind: int
    body: int


@dataclass(frozen=True)
class Advance:
    """The server takes its next step: writes, decides what somebody has judged, or learns."""

    samples: int


@dataclass(frozen=True)
class Drop:
    """The operator withdraws a sample of a sheet."""

    sheet: int
    sample: int


moves = st.one_of(
    st.builds(
        Answer,
        st.sampled_from(["trained", "judgment", "judgment"]),
        st.sampled_from(["a", "b", "c", "stranger"]),
        st.sampled_from([0, 0, 0, 1, 2, -1]),
        st.integers(0, 1),
    ),
    st.builds(Advance, st.integers(0, 4)),
    st.builds(Drop, st.integers(0, 3), st.integers(0, 4)),
)


@dataclass
class Learning:
    """A run with an LLM beside a bookkeeper of the feed."""

    events: list[Event] = field(default_factory=lambda: [Published(0, "a0", 0), *(Enrolled(d, d) for d in "abc")])
    feed: list[str] = field(default_factory=list)
    answers: dict[str, list[Receipt]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = replay(*self.events)

    def handle(self, move: object) -> None:
        state = self.state
        number = len(state.sheets) - 1
        match move:
            case Answer(kind, device, behind, body):
                about = (state.version if kind == "trained" else number) - behind
                id = f"{kind} {body} of {device} for {about}"
                decision = (
                    coordinator.keep(state, trained(device, about), id)
                    if kind == "trained"
                    else judge(state, judgment(device, about), id)
                )
                if not isinstance(decision, Receipt):
                    self._record(decision)
                self.answers.setdefault(id, []).append(self.state.receipts[id])
            case Advance(samples) if number >= 0 and not state.sheets[number].judged:
                if state.sheets[number].ballots:
                    self._record(Decided(number, f"judged{number}", samples, 0.5))
                    self.feed += [f"{number}-{i}" for i in range(samples)]
            case Advance():
                self._record(Tuned(number, f"llm{number}", 0.5) if len(state.tuned) <= number else written(number + 1))
            case Drop(sheet, sample):
                if event := coordinator.withdraw(state, f"{sheet}-{sample}", {x for x in self.feed if not x.startswith("gone")}):
                    self._record(event)
                    self.feed.append(f"gone {event.sample}")

    def _record(self, event: Event) -> None:
        self.events.append(event)
        self.state = apply(self.state, event)


def learn(sequence: list[object]) -> Learning:
    made = Learning()
    for move in sequence:
        try:
            made.handle(move)
        except WireError as error:
            known = {"unknown-device", "unknown-version", "unknown-sheet", "unknown-sample", "already-answered", "too-stale"}
            if error.code not in known:
                raise
    return made


@strategies.fuzzing
@given(st.lists(moves, max_size=60))
def test_replaying_a_run_with_an_llm_gives_the_same_state(sequence: list[object]) -> None:
    """Rule 1 for sheets, judgments and the feed, through JSON."""
    made = learn(sequence)

    assert replay(*map(through_json, made.events)) == made.state


@strategies.fuzzing
@given(st.lists(moves, max_size=60))
def test_sheets_judgments_and_versions_add_up(sequence: list[object]) -> None:
    """Each device judges a sheet once, a version is a decided sheet, and the feed has as many lines as the bookkeeper's."""
    made = learn(sequence)
    pairs = [(event.device, event.sheet) for event in made.events if isinstance(event, Judged)]

    assert len(pairs) == len(set(pairs)) == sum(len(sheet.ballots) for sheet in made.state.sheets)
    assert made.state.version == sum(bool(sheet.judged) for sheet in made.state.sheets) == len(made.state.adapters) - 1
    assert made.state.lines == len(made.feed)
    assert all(receipts == [made.state.receipts[id]] * len(receipts) for id, receipts in made.answers.items())
