"""The reducer's rules, each by example, and all of them for any sequence of requests."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from edge_sdk.cohort import SEALED, SHARE, Advertise, Masked, Reveal, Shares, Terms
from edge_sdk.cohort import Answer as Said
from edge_sdk.errors import WireError
from edge_sdk.protocol import DeviceStatus, Evaluation, Judgment, Measurement, Receipt, SheetStatus, Status, Trained, Update
from edge_server import coordinator
from edge_server.coordinator import (
    Accepted,
    Answered,
    Ballot,
    Buffered,
    Decided,
    Device,
    Dropped,
    Enrolled,
    Evaluated,
    Event,
    Judged,
    Kept,
    Lost,
    Opened,
    Published,
    Sheet,
    State,
    Ticked,
    Tuned,
    Withdrawn,
    Written,
    apply,
)
from edge_server.unmasking import Cohort, Failed
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
    return coordinator.accept(state, message, id, f"blob-{id}", 100, max_staleness, now=0.0)


def due(state: State, buffer_size: int, least: int = 1, deadline_seconds: float = 0.0, now: float = 0.0) -> tuple[Buffered, ...]:
    return coordinator.due(state, buffer_size, least, deadline_seconds, now)


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
    assert State() == State(-1, (), (), Map(), Map(), Map())


def test_an_accepted_update_waits_for_the_next_version() -> None:
    """Accepting remembers the receipt, the numbers and the bytes of the sender, and changes no version."""
    state = apply(AT_0, accepted("u1", "d1", 0, num_examples=7, size=123))

    assert (state.version, state.adapter) == (0, "a0")
    assert state.buffer == (Buffered("blob-u1", "d1", 7, 0),)
    assert dict(state.devices) == {"d1": Device("one", trained=0, updates=1, uploaded_bytes=123), "d2": Device("two")}
    assert dict(state.receipts) == {"u1": Receipt("u1", 0)}
    assert dict(state.measurements) == {0: Measurement("update", "d1", 0, 7, {"loss": 0.5})}


def test_a_receipt_tells_the_newest_version() -> None:
    """A device that is behind learns from its receipt how far the server is."""
    state = replay(*AT_3_EVENTS, accepted("u1", "d1", 1), Evaluated("e1", "d1", 2, 20, {}))

    assert dict(state.receipts) == {"u1": Receipt("u1", 3), "e1": Receipt("e1", 3)}


def test_updates_and_bytes_of_a_device_add_up() -> None:
    """An operator sees what a device has cost so far, not what it cost last."""
    state = replay(*AT_3_EVENTS, accepted("u1", "d1", 1, size=100), accepted("u2", "d1", 3, size=20))

    assert state.devices["d1"] == Device("one", trained=3, updates=2, uploaded_bytes=120)


def test_an_evaluation_joins_no_buffer() -> None:
    """An evaluation is remembered as numbers and makes no version."""
    state = apply(AT_0, Evaluated("e1", "d2", 0, 20, {"accuracy": 0.75}))

    assert state.buffer == ()
    assert state.devices["d2"] == Device("two", evaluated=0)
    assert dict(state.measurements) == {0: Measurement("evaluation", "d2", 0, 20, {"accuracy": 0.75})}


def test_apply_leaves_the_old_state_alone() -> None:
    """A state is a value: whoever holds one sees no later event in it."""
    before = (AT_0.version, AT_0.buffer, dict(AT_0.devices), dict(AT_0.receipts), AT_0.measurements)
    apply(AT_0, accepted("u1", "d1", 0))

    assert before == (AT_0.version, AT_0.buffer, dict(AT_0.devices), dict(AT_0.receipts), AT_0.measurements)


def test_a_new_version_takes_the_oldest_updates() -> None:
    """Rule 5: what was folded leaves the front of the buffer, the rest waits on as it was."""
    full = replay(
        Published(0, "a0", 0), *(Enrolled(f"d{i}", "x") for i in range(4)), *(accepted(f"u{i}", f"d{i}", 0) for i in range(4))
    )
    state = apply(full, Published(1, "a1", 3))

    assert [b.blob for b in due(full, 3)] == ["blob-u0", "blob-u1", "blob-u2"]
    assert (state.version, state.adapter, state.buffer) == (1, "a1", (Buffered("blob-u3", "d3", 10, 0),))


def test_nothing_is_due_before_the_buffer_is_full() -> None:
    """Two updates of three make no version; three do."""
    two = replay(*AT_0_EVENTS, accepted("u1", "d1", 0), accepted("u2", "d2", 0))

    assert due(two, 3) == ()
    assert due(two, 2) == two.buffer


@pytest.mark.parametrize(("now", "made_of"), [(109.0, 0), (110.0, 2), (math.inf, 2)])
def test_a_late_version_is_made_of_what_is_there(now: float, made_of: int) -> None:
    """The first update came at 100 and waits for 10 seconds; the second came at 109 and is taken with it."""
    first, second = (msgspec.structs.replace(accepted(f"u{i}", f"d{i}", 0), at=at) for i, at in ((1, 100.0), (2, 109.0)))
    state = replay(*AT_0_EVENTS, first, second)

    assert [b.at for b in state.buffer] == [100.0, 109.0]
    assert due(state, 3, deadline_seconds=10.0, now=now) == state.buffer[:made_of]


def test_a_deadline_waits_for_the_least_that_is_enough() -> None:
    """However late it is: one update where two are needed makes nothing, and without a deadline no time is late."""
    one = replay(*AT_0_EVENTS, accepted("u1", "d1", 0))

    assert due(one, 3, least=2, deadline_seconds=1.0, now=math.inf) == ()
    assert due(one, 3, least=1, deadline_seconds=1.0, now=math.inf) == one.buffer
    assert due(one, 3, least=1, deadline_seconds=0.0, now=math.inf) == ()
    assert due(AT_0, 3, least=1, deadline_seconds=1.0, now=math.inf) == ()


def test_a_late_version_takes_no_more_than_a_buffer() -> None:
    """What came beyond a full buffer waits for the version after."""
    full = replay(*AT_0_EVENTS, accepted("u1", "d1", 0), accepted("u2", "d2", 0))

    assert due(full, 1, deadline_seconds=1.0, now=math.inf) == full.buffer[:1]


def test_a_device_has_one_update_in_a_version() -> None:
    """Rule 5: its next one waits for the version after, and until then makes no buffer fuller."""
    alone = replay(*AT_3_EVENTS, *(accepted(f"u{version}", "d1", version) for version in range(4)))
    both = replay(*AT_3_EVENTS, accepted("u0", "d1", 0), accepted("u1", "d1", 1), accepted("v0", "d2", 0))
    after = apply(both, Published(4, "a4", 2, at=9.0))

    assert due(alone, 2) == due(after, 2) == ()
    assert [b.blob for b in due(alone, 1)] == ["blob-u0"]
    assert [b.blob for b in due(both, 2)] == ["blob-u0", "blob-v0"]
    assert [b.blob for b in after.buffer] == ["blob-u1"]


def test_a_device_that_had_its_turn_waits_anew() -> None:
    """A late version of one device is not followed at once by another of the same device; others wait since they came."""
    sent = ((accepted("u0", "d1", 0), 100.0), (accepted("u1", "d1", 1), 100.0), (accepted("v0", "d2", 0), 105.0))
    state = replay(*AT_3_EVENTS, *(msgspec.structs.replace(event, at=at) for event, at in sent))
    assert [b.blob for b in due(state, 3, deadline_seconds=10.0, now=110.0)] == ["blob-u0", "blob-v0"]
    both, first = (apply(state, Published(4, "a4", folded, at=110.0)) for folded in (2, 1))

    assert [(b.blob, b.at) for b in both.buffer] == [("blob-u1", 110.0)]
    assert [(b.blob, b.at) for b in first.buffer] == [("blob-u1", 110.0), ("blob-v0", 105.0)]
    assert due(both, 3, deadline_seconds=10.0, now=119.0) == due(first, 3, deadline_seconds=10.0, now=114.0) == ()
    assert due(both, 3, deadline_seconds=10.0, now=120.0) == both.buffer
    assert due(first, 3, deadline_seconds=10.0, now=115.0) == first.buffer


def test_what_has_become_too_stale_while_it_waited_is_dropped() -> None:
    """Rule 4 holds when a version is made: an update taken in time may be too old by then. It leaves its receipt and no trace."""
    arrived = replay(*AT_3_EVENTS, accepted("u1", "d1", 1), accepted("u2", "d2", 2))
    later = apply(arrived, Published(4, "a4", 0))

    assert coordinator.outdated(arrived, MAX_STALENESS) is coordinator.outdated(later, 3) is None
    assert (dropped := coordinator.outdated(later, MAX_STALENESS)) == Dropped(("blob-u1",), "too-stale")
    assert [b.blob for b in apply(later, dropped).buffer] == ["blob-u2"]
    assert accept(apply(later, dropped), update("d1", 1), "u1") == Receipt("u1", 3)
    assert coordinator.outdated(apply(later, dropped), MAX_STALENESS) is None


def test_what_a_revoked_device_has_sent_is_dropped() -> None:
    """Of the updates that a version would be made from; who is not revoked keeps the place."""
    state = replay(*AT_0_EVENTS, accepted("u1", "d1", 0), accepted("u2", "d2", 0))

    assert coordinator.shut_out(state.buffer, {"d1", "d9"}) == Dropped(("blob-u1",), "revoked")
    assert coordinator.shut_out(state.buffer, ()) is None
    assert apply(state, Dropped(("blob-u1",), "revoked")).buffer == state.buffer[1:]


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
    """Devices by name, counts and every measurement."""
    state = replay(Published(0, "a0", 0), Enrolled("d2", "two"), Enrolled("d1", "one"), accepted("u1", "d1", 0))

    assert coordinator.status(state, "lpfl", False) == Status(
        "lpfl",
        0,
        "a0",
        1,
        False,
        (DeviceStatus("d1", "one", 1, 100), DeviceStatus("d2", "two", 0, 0)),
        (Measurement("update", "d1", 0, 10, {"loss": 0.5}),),
        adapters=("a0",),
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
        devices=AT_0.devices.set("d1", Device("one", trained=0)),
        receipts=Map({"k1": Receipt("k1", 0)}),
        measurements=Map({0: Measurement("kept", "d1", 0, 7, {"loss": 0.5})}),
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
    assert dict(state.devices) == {
        "d1": Device("one", judged=0, uploaded_bytes=30),
        "d2": Device("two", judged=0, uploaded_bytes=20),
    }
    assert dict(state.receipts) == {"j2": Receipt("j2", 0), "j1": Receipt("j1", 0)}
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


# Secure averaging -----------------------------------------------------------------------------------------------------
def terms(name: str, size: int = 2) -> Terms:
    return Terms(name, size, size * 2 // 3 + 1, 5, 1.0, 64)


def keys(device: str, cohort: str = "c0", first: int = 0) -> Advertise:
    """Two keys of 32 equal bytes, `first` and the number after it; by default the device's own."""
    start = first or 10 * int(device[1:])
    return Advertise(cohort, device, bytes([start]) * 32, bytes([start + 1]) * 32)


def sealed(device: str, cohort: str = "c0", others: str = "d1 d2") -> Shares:
    return Shares(cohort, device, {other: b"s" * SEALED for other in others.split() if other != device})


def shown(device: str, cohort: str = "c0", survived: str = "d1 d2", dropped: str = "") -> Reveal:
    share = b"\0" * SHARE
    return Reveal(cohort, device, dict.fromkeys(survived.split(), share), dict.fromkeys(dropped.split(), share))


def say(message: Said, at: float = 1.0, blob: str = "", size: int = 0) -> Answered:
    return Answered(message, blob, size, at)


OPENED_EVENTS: tuple[Event, ...] = (*AT_0_EVENTS, Opened(terms("c0"), deadline=10.0, seconds=5.0))
ALL_ANSWERS: tuple[Event, ...] = (
    say(keys("d1"), 1.0),
    say(keys("d2"), 2.0),
    say(sealed("d2"), 3.0),
    say(sealed("d1"), 4.0),
    say(Masked("c0", "d1"), 5.0, "blob1", 100),
    say(Masked("c0", "d2"), 6.0, "blob2", 90),
    say(shown("d1"), 7.0),
    say(shown("d2"), 8.0),
)


def cohort_of(state: State) -> Cohort:
    assert isinstance(state.cohort, Cohort)
    return state.cohort


def test_a_cohort_is_opened_with_its_terms() -> None:
    """It waits until its deadline, the later phases have the seconds the event says, and cohorts are counted."""
    state = replay(*OPENED_EVENTS)

    assert state == replace(AT_0, cohort=Cohort(terms("c0"), 10.0), cohorts=1, seconds=5.0)


def test_answers_lead_from_phase_to_phase() -> None:
    """The last answer of a phase begins the next at once, which lasts five seconds from then."""
    cohorts = [cohort_of(replay(*OPENED_EVENTS, *ALL_ANSWERS[:n])) for n in range(9)]

    assert [(cohort.phase, cohort.deadline) for cohort in cohorts] == [
        *[("advertise", 10.0)] * 2,
        *[("share", 7.0)] * 2,
        *[("upload", 9.0)] * 2,
        *[("unmask", 11.0)] * 2,
        ("done", 13.0),
    ]
    assert cohorts[-1].uploads == {"d1": "blob1", "d2": "blob2"}


def test_only_masked_vectors_count_as_updates() -> None:
    """An operator sees one update a device and the bytes of its vector, not of its keys."""
    state = replay(*OPENED_EVENTS, *ALL_ANSWERS)

    assert dict(state.devices) == {
        "d1": Device("one", updates=1, uploaded_bytes=100),
        "d2": Device("two", updates=1, uploaded_bytes=90),
    }
    assert (len(state.receipts), len(state.measurements), state.buffer, state.version) == (0, 0, (), 0)


def test_a_published_version_ends_its_cohort() -> None:
    """The keys of both devices are remembered, the cohort is not."""
    state = replay(*OPENED_EVENTS, *ALL_ANSWERS, Published(1, "a1", 0))

    assert (state.cohort, state.cohorts, state.version) == (None, 1, 1)
    assert state.keys == {bytes([i]) * 32 for i in (10, 11, 20, 21)}


def test_a_tick_ends_a_phase_only_when_its_time_is_over() -> None:
    """A moment before the deadline nothing happens; at it the cohort goes on, or fails for want of answers."""
    one, both = replay(*OPENED_EVENTS, ALL_ANSWERS[0]), replay(*OPENED_EVENTS, *ALL_ANSWERS[:4])
    four = *AT_0_EVENTS, Enrolled("d3", "three"), Opened(terms("c0", 4), 10.0, 5.0)
    three = replay(*four, *ALL_ANSWERS[:2], say(keys("d3"), 3.0))

    assert apply(one, Ticked(9.99)) == one
    assert apply(one, Ticked(10.0)).cohort == Failed(
        "c0", "only 1 devices answered in the phase `advertise`, this cohort needs 2"
    )
    assert apply(one, Ticked(10.0)).keys == {bytes([10]) * 32, bytes([11]) * 32}
    assert apply(three, Ticked(9.99)) == three
    assert (cohort_of(apply(three, Ticked(12.0))).phase, cohort_of(apply(three, Ticked(12.0))).deadline) == ("share", 17.0)
    assert apply(both, Ticked(8.99)) == both
    assert isinstance(apply(both, Ticked(9.0)).cohort, Failed)


def test_a_lost_cohort_is_followed_by_another() -> None:
    """It stands as failed with its reason, and shares were revealed; the next one knows nothing of it but its keys."""
    lost = replay(*OPENED_EVENTS, *ALL_ANSWERS, Lost("the masks do not cancel"))
    state = apply(lost, Opened(terms("c1"), 30.0, 6.0))

    assert lost.cohort == Failed("c0", "the masks do not cancel", revealed=True)
    assert state.cohort == Cohort(terms("c1"), 30.0)
    assert (state.cohorts, state.seconds, state.keys) == (2, 6.0, lost.keys)
    assert len(state.keys) == 4


def test_an_answer_is_taken_once() -> None:
    """New, it is an event of its bytes and the hour; the same again is none, also phases later; another one is refused."""
    state, sharing, done = (replay(*OPENED_EVENTS, *ALL_ANSWERS[:n]) for n in (2, 4, 8))

    assert coordinator.answer(state, sealed("d1"), "", 0, 3.5) == say(sealed("d1"), 3.5)
    assert coordinator.answer(sharing, Masked("c0", "d1"), "b", 9, 4.5) == say(Masked("c0", "d1"), 4.5, "b", 9)
    assert coordinator.answer(state, keys("d1"), "", 0, 3.5) is None
    assert coordinator.answer(done, keys("d1"), "", 0, 99.0) is None
    assert coordinator.answer(done, Masked("c0", "d2"), "blob2", 90, 99.0) is None
    assert code(lambda: coordinator.answer(state, keys("d1", first=7), "", 0, 3.5)) == ("already-answered", 409)
    assert code(lambda: coordinator.answer(done, Masked("c0", "d2"), "other", 90, 9.0)) == ("already-answered", 409)


def test_an_answer_that_cannot_be_taken_is_refused() -> None:
    """Strangers, no cohort, a failed one, another one, the wrong phase, and old keys each have their code."""
    state, done = replay(*OPENED_EVENTS), replay(*OPENED_EVENTS, *ALL_ANSWERS)
    lost = apply(done, Lost("somebody lied"))
    second = apply(lost, Opened(terms("c1"), 30.0, 6.0))
    sharing = replay(*AT_0_EVENTS, Enrolled("d3", "three"), Opened(terms("c0"), 10.0, 5.0), *ALL_ANSWERS[:2])

    def refused(state: State, message: Said) -> tuple[str, int]:
        return code(lambda: coordinator.answer(state, message, "", 0, 9.0))

    assert refused(state, keys("d9")) == refused(AT_0, keys("d9")) == ("unknown-device", 403)
    assert refused(AT_0, keys("d1")) == refused(apply(done, Published(1, "a1", 0)), keys("d1")) == ("no-cohort", 409)
    assert refused(lost, keys("d1")) == ("cohort-failed", 409)
    assert refused(state, keys("d1", "c1")) == refused(second, keys("d1")) == ("wrong-cohort", 409)
    assert refused(state, sealed("d1")) == ("too-early", 409)
    assert refused(sharing, keys("d3")) == ("too-late", 409)
    assert refused(sharing, sealed("d3", others="d1 d2")) == ("not-in-cohort", 403)
    assert refused(sharing, sealed("d1", others="d3")) == ("bad-list", 422)
    for first in (9, 10, 11, 19, 21):  # one of the two was a key of d1 or d2
        assert refused(second, keys("d2", "c1", first)) == ("bad-keys", 422)
    assert coordinator.answer(second, keys("d2", "c1", 30), "", 0, 9.0) == say(keys("d2", "c1", 30), 9.0)


def test_events_of_a_cohort_survive_the_disk() -> None:
    """Opened, the four answers, ticks and losses come back from JSON as they were, and replay to the same state."""
    later = (Lost("x"), Opened(terms("c1"), 20.0, 5.0), say(keys("d1", "c1", 40), 19.0), Ticked(20.5))
    events = [*OPENED_EVENTS, *ALL_ANSWERS, *later]

    assert [through_json(event) for event in events] == events
    assert replay(*map(through_json, events)) == replay(*events)
    assert isinstance(replay(*events).cohort, Failed)


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
    waiting: list[tuple[str, str, int]] = field(default_factory=list)  # blob, device and base version, oldest first
    made_of: list[list[tuple[str, str, int]]] = field(default_factory=list)  # of each version, the same
    dropped: list[str] = field(default_factory=list)

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
                        self.waiting.append((f"blob-{id}", device, version))
                self.answers.setdefault(id, []).append(self.state.receipts[id])
            case Publish() if self.state.version < 0:
                self._record(Published(0, "a0", 0))
            case Publish():
                self._drop()
                while batch := due(self.state, BUFFER_SIZE):
                    version = self.state.version + 1
                    self._record(Published(version, f"a{version}", len(batch)))
                    self._take({buffered.blob for buffered in batch})
                    self._drop()

    def _take(self, blobs: set[str]) -> None:
        self.made_of.append([update for update in self.waiting if update[0] in blobs])
        self.waiting = [update for update in self.waiting if update[0] not in blobs]

    def _drop(self) -> None:
        if dropped := coordinator.outdated(self.state, MAX_STALENESS):
            self._record(dropped)
            stale = [blob for blob, _, version in self.waiting if self.state.version - version > MAX_STALENESS]
            assert list(dropped.blobs) == stale
            self.waiting = [update for update in self.waiting if update[0] not in stale]
            self.dropped += stale

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
def test_staleness_is_bounded_when_a_version_is_made(sequence: list[object]) -> None:
    """Rule 4: the buffer holds, in order of arrival, what the bookkeeper wrote down then, and nothing too old is averaged."""
    made = run(sequence)

    assert [(buffered.blob, buffered.device, buffered.version) for buffered in made.state.buffer] == made.waiting
    assert all(0 <= before - base <= MAX_STALENESS for before, batch in enumerate(made.made_of) for _, _, base in batch)


@strategies.fuzzing
@given(sequences)
def test_every_update_is_folded_once_or_dropped_and_each_devices_in_order_of_arrival(sequence: list[object]) -> None:
    """Rule 5: versions eat the updates of three devices at a time, each device's oldest first, and leave the rest."""
    made = run(sequence)
    arrived = [(event.blob, event.device) for event in made.events if isinstance(event, Accepted)]
    folded = [(blob, device) for batch in made.made_of for blob, device, _ in batch]
    waiting = [blob for blob, _, _ in made.waiting]

    assert sorted([*(blob for blob, _ in folded), *made.dropped, *waiting]) == sorted(blob for blob, _ in arrived)
    assert all(len({device for _, device, _ in batch}) == len(batch) == BUFFER_SIZE for batch in made.made_of)
    assert len(made.made_of) == max(made.state.version, 0)
    for one in "abcd":
        mine = [update for update in folded if update[1] == one]
        assert mine == [update for update in arrived if update in mine]


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


# Any sequence of a run with secure averaging --------------------------------------------------------------------------
PHASES = ("advertise", "share", "upload", "unmask")


@dataclass(frozen=True)
class Speak:
    """A device answers a phase, of this or the last cohort; `body` tells two answers apart."""

    device: str
    phase: str
    body: int = 0
    late: bool = False


@dataclass(frozen=True)
class Pass:
    """Time passes, and the server looks at the deadline, at the sum, which may be a lie, or for the next cohort."""

    seconds: float
    lied: bool = False


speaking = st.builds(
    Speak,
    st.sampled_from(["d1", "d2", "d3", "d4", "d9"]),
    st.sampled_from(PHASES),
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from([False, False, False, True]),
)
passing = st.builds(Pass, st.sampled_from([0.5, 1.0, 6.0]), st.booleans())


@st.composite
def cohort_lives(draw: st.DrawFn) -> list[object]:
    """Up to four cohorts of four devices, of which one may be off from some phase on, with anything at all in between."""
    moves: list[object] = []
    for _ in range(draw(st.integers(0, 4))):
        there = draw(st.permutations(["d1", "d2", "d3", "d4", "d5"]))[:4]
        off = draw(st.sampled_from([*PHASES, "never", "never"]))
        for phase in PHASES:
            if phase == off:
                there = there[: draw(st.sampled_from([2, 3, 3, 3]))]
            moves += [Speak(device, phase) for device in there]
            moves += [Pass(6.0)] if phase == off and phase != "unmask" else []
            moves += draw(st.sampled_from([0, 0, 1]).flatmap(lambda most: st.lists(speaking, max_size=most)))
        moves += draw(st.lists(passing, max_size=3))
    return moves + draw(st.lists(speaking | passing, max_size=5))


@dataclass
class Masking:
    """A run of masked updates, whose cohorts have four places and need three, beside a bookkeeper of keys and vectors."""

    events: list[Event] = field(default_factory=lambda: [Published(0, "a0", 0), *(Enrolled(f"d{i}", "x") for i in range(1, 6))])
    now: float = 0.0
    used: dict[bytes, str] = field(default_factory=dict)  # key -> cohort
    versions: list[tuple[str, ...]] = field(default_factory=list)  # whose vectors made them
    refused: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.state = replay(*self.events)
        self._record(Opened(terms("c0", 4), 5.0, 5.0))

    def handle(self, move: object) -> None:
        match move, self.state.cohort:
            case Speak(), cohort:
                there = cohort if isinstance(cohort, Cohort) else Cohort(terms("none"), 0.0)
                self._speak(move, max(self.state.cohorts - 1 - move.late, 0), there)
            case Pass(seconds, lied), Cohort() as cohort:
                self.now += seconds
                if cohort.phase != "done":
                    self._record(Ticked(self.now))
                elif lied:
                    self._record(Lost("somebody lied"))
                else:
                    self.versions.append(tuple(sorted(cohort.uploads)))
                    self._record(Published(self.state.version + 1, f"a{self.state.version + 1}", 0))
            case Pass(seconds), _:
                self.now += seconds
                self._record(Opened(terms(f"c{self.state.cohorts}", 4), self.now + 5, 5.0))

    def _speak(self, move: Speak, number: int, there: Cohort) -> None:
        name, dropped = f"c{number}", there.shares.keys() - there.uploads.keys()
        message: Said
        match move.phase:
            case "advertise":
                own = 2 * int(move.device[1:])  # with `body` the same keys in every cohort
                message = keys(move.device, name, first=200 + own if move.body else 1 + 20 * (number % 8) + own)
            case "share":
                message = sealed(move.device, name, " ".join(there.adverts))
            case "upload":
                message = Masked(name, move.device)
            case _:
                message = shown(move.device, name, " ".join(there.uploads), " ".join(dropped))
        blob = f"blob {name} {move.device} {move.body}" if isinstance(message, Masked) else ""
        try:
            event = coordinator.answer(self.state, message, blob, 7 * bool(blob), self.now)
        except WireError as error:
            self.refused.add(error.code)
            return
        if event is not None:
            self._record(event)
            if isinstance(message, Advertise):
                for key in (message.cipher_key, message.mask_key):
                    assert self.used.setdefault(key, name) == name  # a key is of one cohort

    def _record(self, event: Event) -> None:
        self.events.append(event)
        self.state = apply(self.state, event)


def mask(sequence: list[object]) -> Masking:
    made = Masking()
    for move in sequence:
        made.handle(move)
    return made


@strategies.fuzzing
@given(cohort_lives())
def test_replaying_a_run_of_masked_updates_gives_the_same_state(sequence: list[object]) -> None:
    """Rule 1 for cohorts, in whatever order devices speak, repeat themselves, or time passes; through JSON."""
    made = mask(sequence)
    cohort = {"no-cohort", "cohort-failed", "wrong-cohort", "not-in-cohort", "bad-keys", "bad-list"}

    assert replay(*map(through_json, made.events)) == made.state
    assert made.refused <= cohort | {"unknown-device", "already-answered", "too-early", "too-late"}


@strategies.fuzzing
@given(cohort_lives())
def test_cohorts_keys_and_vectors_add_up(sequence: list[object]) -> None:
    """A version is of three or four devices' vectors; nobody is in a phase that was not in the one before; no key comes again."""
    made = mask(sequence)
    said = [event.answer for event in made.events if isinstance(event, Answered)]
    vectors = [event for event in made.events if isinstance(event, Answered) and event.blob]
    cohort, under_way = made.state.cohort, f"c{made.state.cohorts - 1}"

    assert len({(type(answer), answer.device, answer.cohort) for answer in said}) == len(said)
    assert made.state.version == len(made.versions)
    assert all(3 <= len(version) <= 4 for version in made.versions)
    assert sum(device.updates for device in made.state.devices.values()) == len(vectors)
    assert sum(device.uploaded_bytes for device in made.state.devices.values()) == 7 * len(vectors)
    assert made.state.cohorts == sum(isinstance(event, Opened) for event in made.events)
    assert made.state.keys == {k for k, name in made.used.items() if name != under_way or not isinstance(cohort, Cohort)}
    if isinstance(cohort, Cohort):
        assert cohort.uploads.keys() <= cohort.shares.keys() <= cohort.adverts.keys()
        assert cohort.reveals.keys() <= cohort.uploads.keys()


def test_the_sequences_above_make_versions() -> None:
    """Such moves lead to versions of four and of three devices, with a cohort between them that was lost."""
    four: list[object] = [Speak(device, phase) for phase in PHASES for device in ("d1", "d2", "d3", "d4")]
    three: list[object] = []
    for phase in PHASES:
        three += [Speak(device, phase) for device in ("d1", "d2", "d3", "d4")[: 3 + (phase in PHASES[:2])]]
        three += [Pass(6.0)] if phase == "upload" else []
    three.append(Pass(0.0))
    made = mask([*four, Pass(0.0), Pass(0.0), *four, Pass(0.0, lied=True), Pass(0.0), *three])

    assert made.versions == [("d1", "d2", "d3", "d4"), ("d1", "d2", "d3")]
    assert sum(isinstance(event, Lost) for event in made.events) == 1
    assert made.refused == {"too-late"}  # the last phase waits for three
