"""The device's state machine: its four rules, every transition, and no other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.cohort import Delivery, Join, Mask, Request, Roster, SealShares, Survivors, Terms, Unmask
from edge_sdk.protocol import Evaluate, Finished, Predict, Train, Wait
from edge_sdk.session import (
    CAME_LATE,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    LONGEST_WAIT,
    PAUSE_AFTER_FAILED_WORK,
    SHORTEST_WAIT,
    Action,
    AskForWork,
    Assigned,
    Delivered,
    Do,
    Drop,
    Event,
    NoAnswer,
    Rejected,
    Send,
    Session,
    Sleep,
    Started,
    Stop,
    Woke,
    Worked,
    WorkFailed,
    pause,
    step,
)
from edge_sdk.softlabels import SoftLabels
from edge_sdk.training.batches import Training
from tests import strategies  # noqa: F401  # its hypothesis profile

TRAIN = Train(1, "ab" * 32, Training(), SoftLabels(), 0)
EVALUATE = Evaluate(1, "ab" * 32)
FINISHED = Finished(2, "cd" * 32)
PREDICT = Predict(0, "ab" * 32, "ef" * 32, 100, 2, "agree")
TERMS = Terms("c-1", 2, 2, 40, 1.0, 64)
JOIN = Join(1, TERMS)
COHORT = (JOIN, SealShares(1, Roster(TERMS, ())), Mask(1, Delivery("c-1", "d", {})), Unmask(1, Survivors("c-1", (), ())))
WORKS = (TRAIN, PREDICT, EVALUATE, FINISHED, *COHORT)

seconds = st.floats(0, 10_000)
answers: dict[type, st.SearchStrategy[Any]] = {
    AskForWork: st.one_of(
        st.sampled_from([*(Assigned(work) for work in WORKS), Rejected("unknown-device")]),
        st.builds(Assigned, st.builds(Wait, seconds)),
        st.builds(NoAnswer, seconds),
    ),
    Do: st.sampled_from([Worked(), WorkFailed("no labelled text")]) | st.builds(NoAnswer, seconds),
    Send: st.sampled_from([Delivered(), Rejected("too-stale")]) | st.builds(NoAnswer, seconds),
    Drop: st.just(Woke()),
    Sleep: st.just(Woke()),
}
ACTIONS: list[Action] = [AskForWork(), Do(TRAIN), Do(PREDICT), Do(JOIN), Send(), Drop("too-stale"), Sleep(1.0), Stop()]
EVENTS: list[Event] = [
    Assigned(TRAIN),
    Assigned(PREDICT),
    Assigned(JOIN),
    Assigned(Wait(1.0)),
    Assigned(FINISHED),
    Worked(),
    WorkFailed(""),
    Delivered(),
    Rejected(""),
    NoAnswer(),
    Woke(),
]
POSSIBLE: dict[type, set[type]] = {
    AskForWork: {Assigned, Rejected, NoAnswer},
    Do: {Worked, WorkFailed, NoAnswer},
    Send: {Delivered, Rejected, NoAnswer},
    Drop: {Woke},
    Sleep: {Woke},
    Stop: set(),
}


def run(session: Session, *events: Event, jitter: float = 0.5) -> list[Action]:
    """The actions that follow these events."""
    actions = []
    for event in events:
        session, action = step(session, event, jitter)
        actions.append(action)
    return actions


def doing(action: Action) -> Session:
    """A session in the middle of `action`."""
    return Session(action, after_sleep=AskForWork() if isinstance(action, Sleep) else None)


# Every transition -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("before", "event", "after"),
    [
        (AskForWork(), Assigned(TRAIN), Do(TRAIN)),
        (AskForWork(), Assigned(PREDICT), Do(PREDICT)),
        (AskForWork(), Assigned(EVALUATE), Do(EVALUATE)),
        (AskForWork(), Assigned(Wait(2.5)), Sleep(2.5)),
        (AskForWork(), Assigned(FINISHED), Do(FINISHED)),
        *((AskForWork(), Assigned(work), Do(work)) for work in COHORT),
        *((Do(work), Worked(), Send()) for work in COHORT),
        *((Do(work), WorkFailed("its keys are lost"), Sleep(PAUSE_AFTER_FAILED_WORK)) for work in COHORT),
        (Do(FINISHED), Worked(), Stop()),
        (Do(FINISHED), WorkFailed("damaged"), Sleep(PAUSE_AFTER_FAILED_WORK)),
        (AskForWork(), Rejected("unknown-device"), Sleep(PAUSE_AFTER_FAILED_WORK)),
        (Do(TRAIN), Worked(), Send()),
        (Do(PREDICT), Worked(), Send()),
        (Do(PREDICT), WorkFailed("damaged"), Sleep(PAUSE_AFTER_FAILED_WORK)),
        (Do(EVALUATE), Worked(), Send()),
        (Do(TRAIN), WorkFailed("no torch"), Sleep(PAUSE_AFTER_FAILED_WORK)),
        (Send(), Delivered(), AskForWork()),
        (Send(), Rejected("too-stale"), Drop("too-stale")),
        (Drop("too-stale"), Woke(), AskForWork()),
        (Drop("already-answered"), Woke(), AskForWork()),
        (Drop("not-finite"), Woke(), Sleep(PAUSE_AFTER_FAILED_WORK)),
        (Sleep(1.0), Woke(), AskForWork()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_transition(before: Action, event: Event, after: Action) -> None:
    """Each event leads to the one action the rules name, and the session remembers it is under way."""
    session, action = step(doing(before), event, 0.5)

    assert action == after
    assert session.doing == after


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: type(action).__name__)
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_follows_or_is_a_bug(action: Action, event: Event) -> None:
    """What can follow an action moves the session; anything else is a bug of the shell and raises ValueError."""
    if type(event) in POSSIBLE[type(action)]:
        assert step(doing(action), event, 0.5)[0] != doing(action)
    else:
        with pytest.raises(ValueError, match="cannot follow"):
            step(doing(action), event, 0.5)


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: type(action).__name__)
@pytest.mark.parametrize("pending", [True, False])
def test_a_start_begins_afresh(action: Action, pending: bool) -> None:
    """Whatever was under way, with however many failures, a start sends what waits or asks for work."""
    session, first = step(Session(action, after_sleep=Send(), failures=9), Started(pending), 0.5)

    assert first == (Send() if pending else AskForWork())
    assert session == Session(first)


@pytest.mark.parametrize(("pending", "first"), [(False, Do(TRAIN)), (True, Send())])
def test_a_start_finishes_what_was_being_trained(pending: bool, first: Action) -> None:
    """Interrupted training goes on before anything is asked; a result that waits goes before that."""
    session, action = step(Session(Sleep(9.0), after_sleep=AskForWork(), failures=3), Started(pending, TRAIN), 0.5)

    assert action == first
    assert session == Session(first)


@pytest.mark.parametrize("event", [WorkFailed("damaged"), NoAnswer(), Worked()])
def test_interrupted_training_is_gone_on_with_once(event: Event) -> None:
    """After a start with work under way, failure leads to asking, success to sending; old work never comes back by itself."""
    session, action = step(Session(AskForWork()), Started(False, TRAIN), 0.5)
    session, action = step(session, event, 0.5)
    if isinstance(event, Worked):
        assert action == Send()
    else:
        assert isinstance(action, Sleep)
        assert step(session, Woke(), 0.5)[1] == AskForWork()


# Rule 1: what waits is delivered before new work is asked for ----------------------------------------------------------
@given(st.booleans(), st.data())
def test_no_life_breaks_the_rules(pending: bool, data: st.DataObject) -> None:
    """Any possible sequence of events, restarts included, never raises; and while a result waits, no work is asked for."""
    works = st.none() | st.just(TRAIN)
    session, action = step(Session(AskForWork()), Started(pending, data.draw(works)), 0.0)
    assert isinstance(action, Send) == pending
    for _ in range(data.draw(st.integers(0, 30))):
        restart = data.draw(st.integers(0, 9)) == 0 or isinstance(action, Stop)
        event: Event = Started(pending, data.draw(works)) if restart else data.draw(answers[type(action)])
        pending = _fills(action, event) or (pending and not _empties(action, event))
        session, action = step(session, event, data.draw(st.floats(0, 1, exclude_max=True)))

        assert session.doing == action
        if not isinstance(action, Sleep):
            assert isinstance(action, (Send, Drop)) == pending
        else:
            waited = event.retry_after if isinstance(event, NoAnswer) else 0.0
            assert min(waited, LONGEST_WAIT) <= action.seconds <= LONGEST_WAIT


def _fills(action: Action, event: Event) -> bool:
    """Whether the shell has put a result into the outbox before it reported `event`."""
    return isinstance(event, Worked) and isinstance(action, Do) and not isinstance(action.work, Finished)


def _empties(action: Action, event: Event) -> bool:
    """Whether the shell has emptied the outbox before it reported `event`."""
    return isinstance(event, Delivered) or (isinstance(action, Drop) and isinstance(event, Woke))


# Rule 2: a network failure changes nothing but the time ----------------------------------------------------------------
def test_pauses_double_up_to_ten_minutes() -> None:
    """1, 2, 4, ... 512 and then 600 seconds, times the random share; no number of failures overflows."""
    assert [pause(failures, 1.0) for failures in range(12)] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600]
    assert pause(10**9, 1.0) == LONGEST_PAUSE
    assert pause(4, 0.25) == 4.0


@given(st.integers(0, 1000), st.floats(0, 1, exclude_max=True))
def test_a_pause_is_within_its_bound(failures: int, jitter: float) -> None:
    """Full jitter: between nothing and the doubled pause, never over the longest."""
    assert 0 <= pause(failures, jitter) <= min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(failures, 40))


@pytest.mark.parametrize("action", [AskForWork(), Send()])
def test_the_same_action_is_repeated_after_longer_and_longer_pauses(action: Action) -> None:
    """Four failures in a row: half of 1, 2, 4 and 8 seconds, and after each the action that failed."""
    failed: list[Event] = [NoAnswer(), Woke()]
    actions = run(Session(action), *failed * 4, jitter=0.5)

    assert actions == [Sleep(0.5), action, Sleep(1.0), action, Sleep(2.0), action, Sleep(4.0), action]


@pytest.mark.parametrize("work", WORKS, ids=lambda work: type(work).__name__)
def test_work_that_lost_the_network_is_asked_for_again(work: Train | Predict | Evaluate | Finished | Request) -> None:
    """Work whose adapter could not be fetched may be outdated by the time the network is back, so it is asked for anew."""
    assert run(Session(Do(work)), NoAnswer(), Woke()) == [Sleep(0.5), AskForWork()]


def test_success_forgets_failures() -> None:
    """After an answer the next failure starts with the shortest pause again."""
    failed: list[Event] = [NoAnswer(), Woke()] * 5
    actions = run(Session(Send()), *failed, Delivered(), NoAnswer(), jitter=0.5)

    assert actions[-3:] == [Send(), AskForWork(), Sleep(0.5)]


@given(st.integers(0, 40), st.floats(0, 1, exclude_max=True), st.floats(0, 10_000))
def test_never_sooner_than_the_server_said(failures: int, jitter: float, retry_after: float) -> None:
    """`Retry-After` is a lower bound, even over the longest pause of our own, but for at most an hour."""
    _, action = step(Session(Send(), failures=failures), NoAnswer(retry_after), jitter)

    assert action == Sleep(max(min(retry_after, LONGEST_WAIT), pause(failures, jitter)))


@pytest.mark.parametrize(("asked", "slept"), [(-5.0, SHORTEST_WAIT), (0.0, SHORTEST_WAIT), (7.0, 7.0), (1e9, LONGEST_WAIT)])
def test_a_server_cannot_make_a_device_spin_or_sleep_for_ever(asked: float, slept: float) -> None:
    """What a server asks to wait is held between 0.02 seconds and an hour."""
    assert run(Session(AskForWork()), Assigned(Wait(asked))) == [Sleep(slept)]


# Rules 3 and 4 --------------------------------------------------------------------------------------------------------
def test_a_result_that_is_refused_for_good_is_dropped_and_new_work_asked_for() -> None:
    """Rule 3: a refusal no repeat can cure empties the outbox, by its code, and the device goes on."""
    assert run(Session(Send()), Rejected("too-stale"), Woke()) == [Drop("too-stale"), AskForWork()]


def test_work_that_fails_is_tried_again_after_a_minute() -> None:
    """Rule 4: a device that cannot work asks again, without hurry and without growing pauses."""
    actions = run(Session(Do(TRAIN)), WorkFailed("no torch"), Woke(), Assigned(TRAIN), WorkFailed("no torch"))

    assert actions == [Sleep(60.0), AskForWork(), Do(TRAIN), Sleep(60.0)]


@pytest.mark.parametrize("code", ["too-late", "no-cohort", "wrong-cohort", "cohort-failed", "cohort-full"])
def test_a_cohort_that_went_on_is_left_at_once(code: str) -> None:
    """Rule 3: an answer that only came too late is dropped, and what there is to do now is asked for without a pause."""
    assert code in CAME_LATE
    assert run(Session(Send()), Rejected(code), Woke()) == [Drop(code), AskForWork()]


@pytest.mark.parametrize("code", ["bad-keys", "bad-list", "bad-shares", "not-in-cohort", "too-early", "wrong-shape"])
def test_an_answer_that_would_be_refused_again_is_not_hurried(code: str) -> None:
    """Rule 3: where the same request would meet the same refusal, the device waits a minute."""
    assert run(Session(Send()), Rejected(code), Woke(), Woke()) == [Drop(code), Sleep(PAUSE_AFTER_FAILED_WORK), AskForWork()]
