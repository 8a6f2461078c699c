"""What becomes of synthetic texts, by hand: which are good, what stands beside what, what the LLM is taught; and who does what
when, by table and for devices in any order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from edge_sdk import softlabels, wire
from edge_sdk.errors import SettingsError
from edge_sdk.protocol import (
    Evaluate,
    Evaluation,
    Finished,
    Judgment,
    Line,
    Mix,
    Predict,
    Receipt,
    Train,
    Trained,
    Update,
    Wait,
    Work,
)
from edge_sdk.softlabels import SoftLabels
from edge_server import coordinator
from edge_server.coordinator import Ballot, Buffered, Decided, Device, Enrolled, Event, Published, Sheet, State, Tuned, Written
from edge_server.knowledge import judging
from edge_server.knowledge.judging import Verdict
from edge_server.llm.jobs import Good, Labelled, Lessons, Pair, Tuning
from edge_server.systems import crosslm
from edge_server.systems.crosslm import (
    CrossLm,
    DecideSheet,
    Draft,
    Judged,
    Step,
    TuneLlm,
    WriteSheet,
    acceptance,
    decide,
    lessons,
    prompts,
)
from edge_server.systems.lpfl import LpFl
from tests import factories, strategies

DRAFTS = [Draft("p0", 0, "a"), Draft("p0", 0, "b"), Draft("p1", 1, "c"), Draft("p1", 1, "d"), Draft("p1", 1, "e")]
SOFT = np.array([[0.9, 0.1], [0.3, 0.7], [0.45, 0.55], [0.2, 0.8], [0.0, 0.0]])
RUN = CrossLm(
    ("a {label} film",), versions=2, judges=2, deadline_seconds=100.0, wait_seconds=7.0, weight=0.5, batch_size=3, seed=40
)
OPEN = Sheet("texts", "drafts", 90, 4, "", at=1000.0)
DONE = replace(OPEN, ballots=(Ballot("d0", "b0"),), judged="judged", samples=3, acceptance=0.75)
VERDICT = Verdict(SOFT, (1.0, 1.0), np.array([2, 1, 2, 2, 0]))


def test_prompts_ask_for_every_label_in_every_pattern() -> None:
    """Patterns times names."""
    assert prompts(["a {label} film", "{label}!"], ["bad", "good"]) == [
        ("a bad film", 0),
        ("a good film", 1),
        ("bad!", 0),
        ("good!", 1),
    ]


def test_decisions_by_hand() -> None:
    """Sure of its label: good; another label: bad; its own but unsure: neither; judged by nobody: left out."""
    decided = decide(DRAFTS, VERDICT, 0.6)

    assert [(x.draft.text, x.quality, x.good, x.bad) for x in decided] == [
        ("a", 0.9, True, False),
        ("b", 0.3, False, True),
        ("c", 0.55, False, False),
        ("d", 0.8, True, False),
    ]
    assert decided[1].soft == (0.3, 0.7)
    assert acceptance(decided) == 0.5
    assert acceptance([]) == 0


def test_lessons_by_hand() -> None:
    """Good texts by quality, a contrast where a prompt has both, the task from all."""
    found = lessons(decide(DRAFTS, VERDICT, 0.6), ["base"])

    assert found.good == (Good("p0", "a", 0.9), Good("p1", "d", 0.8))
    assert found.pairs == (Pair("p0", "a", "b"),)
    assert [(x.text, x.probabilities) for x in found.labelled][:2] == [("a", (0.9, 0.1)), ("b", (0.3, 0.7))]
    assert len(found.labelled) == 4
    assert found.leash == ("base",)


def test_the_best_meets_the_worst() -> None:
    """Two good and three bad of one prompt: best beside worst, then around again."""

    def judged(text: str, quality: float) -> Judged:
        return Judged(Draft("p", 0, text), (quality, 1 - quality), quality, quality >= 0.6, quality < 0.5)

    some = [judged("g7", 0.7), judged("b4", 0.4), judged("g9", 0.9), judged("b1", 0.1), judged("b2", 0.2), judged("u", 0.55)]

    assert [(x.good, x.bad) for x in lessons(some, []).pairs] == [("g9", "b1"), ("g7", "b2"), ("g9", "b4")]


def test_a_rounded_sum_is_still_a_probability() -> None:
    """Eleven judges agree, and their weights sum to a last bit more than 1: devices would refuse a feed that says so."""
    claims = (0.63, 0.57, 0.64, 0.62, 0.56, 0.57, 0.73, 0.67, 0.63, 0.67, 0.6)
    verdict = judging.combine([judging.Ballot(np.array([[1.0, 0.0]]), claim) for claim in claims], [0])
    samples = crosslm.samples_of(decide([Draft("p", 0, "a")], verdict, 0.6), 0, 1, ["a", "b"], "llm", "")

    assert samples[0].soft == (1.0, 0.0)
    assert wire.unpack_lines(wire.pack_lines(samples), Line) == samples  # type: ignore[arg-type]  # a union is fine for msgspec


def test_a_sheet_and_its_samples_share_ids() -> None:
    """A sample is found again in its sheet; the same text for another label, or in another sheet, has another id."""
    decided = decide(DRAFTS, VERDICT, 0.6)
    texts = crosslm.texts_of(DRAFTS, 3)
    samples = crosslm.samples_of(decided, 3, 11, ["bad", "good"], "llm", "sha")

    assert [(text.text, text.label) for text in texts] == [(draft.text, draft.label) for draft in DRAFTS]
    assert [(s.seq, s.id, s.text, s.label, s.soft, s.quality, s.version, s.model, s.adapter) for s in samples] == [
        (11, texts[0].id, "a", "bad", (0.9, 0.1), 0.9, 3, "llm", "sha"),
        (12, texts[3].id, "d", "good", (0.2, 0.8), 0.8, 3, "llm", "sha"),
    ]
    ids = {crosslm.id_of(sheet, Draft("p", label, "a")) for sheet in (0, 1) for label in (0, 1)}
    assert len(ids) == 4
    assert crosslm.id_of(0, Draft("p", 0, "a")) == crosslm.id_of(0, Draft("another", 0, "a"))


@pytest.mark.parametrize(
    ("taught", "tuning", "some"),
    [
        (Lessons(), Tuning(), False),
        (Lessons(leash=("a",)), Tuning(), False),
        (Lessons(labelled=(Labelled("a", (0.5, 0.5)),)), Tuning(), True),
        (Lessons(labelled=(Labelled("a", (0.5, 0.5)),)), Tuning(task=0), False),
        (Lessons(good=(Good("p", "a", 1.0),)), Tuning(), True),
        (Lessons(good=(Good("p", "a", 1.0),)), Tuning(generation=0), False),
        (Lessons(pairs=(Pair("p", "a", "b"),)), Tuning(), True),
        (Lessons(pairs=(Pair("p", "a", "b"),)), Tuning(contrast_weight=0), False),
        (Lessons(pairs=(Pair("p", "a", "b"),)), Tuning(contrast="none"), False),
    ],
)
def test_there_is_something_to_learn_or_not(taught: Lessons, tuning: Tuning, some: bool) -> None:
    """Lessons count where their weight does; a leash alone teaches nothing."""
    assert crosslm.teach(taught, tuning) is some


# Who does what when ---------------------------------------------------------------------------------------------------
def at(*sheets: Sheet, tuned: int = 0, devices: tuple[Device, ...] = ()) -> State:
    """A run with these sheets, whose LLM has learned from `tuned`."""
    decided = [i for i, sheet in enumerate(sheets) if sheet.judged]
    version = len(decided)
    known = Map({f"d{i}": device for i, device in enumerate(devices)})
    adapters = ("a",) * (version + 1)
    return State(version, adapters, (), known, sheets=sheets, tuned=("llm",) * tuned, feed=tuple(decided))


def judged_by(count: int) -> Sheet:
    return replace(OPEN, ballots=tuple(Ballot(f"d{i}", f"b{i}") for i in range(count)))


@pytest.mark.parametrize(
    ("state", "now", "step"),
    [
        pytest.param(at(), 0.0, WriteSheet(0), id="nothing written"),
        pytest.param(at(judged_by(0)), 1000.0, None, id="no answer"),
        pytest.param(at(judged_by(1)), 1000.0, None, id="too few answers"),
        pytest.param(at(judged_by(2)), 1000.0, DecideSheet(0), id="enough answers"),
        pytest.param(at(judged_by(3)), 1000.0, DecideSheet(0), id="more than enough"),
        pytest.param(at(judged_by(1)), 1099.9, None, id="just before the deadline"),
        pytest.param(at(judged_by(1)), 1100.0, DecideSheet(0), id="the deadline with one answer"),
        pytest.param(at(judged_by(0)), 9999.0, None, id="the deadline with none"),
        pytest.param(at(DONE), 9999.0, TuneLlm(0), id="decided"),
        pytest.param(at(DONE, tuned=1), 9999.0, WriteSheet(1), id="tuned"),
        pytest.param(at(DONE, judged_by(2), tuned=1), 1000.0, DecideSheet(1), id="the second has enough"),
        pytest.param(at(DONE, judged_by(1), tuned=1), 1000.0, None, id="the second has too few"),
        pytest.param(at(DONE, DONE, tuned=1), 9999.0, TuneLlm(1), id="the last decided"),
        pytest.param(at(DONE, DONE, tuned=2), 9999.0, None, id="all done"),
    ],
)
def test_what_the_server_does_next(state: State, now: float, step: Step | None) -> None:
    """Write, decide once enough have judged or time is up, learn, and so on to the end."""
    assert crosslm.due(RUN, state, now) == step


LEARN_0 = Train(0, "a", RUN.alone, None, 41, synthetic=None, share=False)
LEARN_1 = Train(1, "a", RUN.training, None, 41, synthetic=Mix(3, 0.5, 3, 0.5), share=False)
LEARN_2 = Train(2, "a", RUN.training, None, 41, synthetic=Mix(6, 0.5, 3, 0.5), share=False)


def predict(number: int) -> Predict:
    return Predict(number, "a", "texts", 90, 4, "probabilities")


@pytest.mark.parametrize(
    ("state", "device", "can_train", "work"),
    [
        pytest.param(at(), Device("x"), True, LEARN_0, id="a newcomer learns without synthetic texts"),
        pytest.param(at(OPEN), Device("x"), True, LEARN_0, id="also while a sheet is open"),
        pytest.param(at(), Device("x", trained=0), True, Wait(7.0), id="trained, nothing written"),
        pytest.param(at(OPEN), Device("x", trained=0), True, predict(0), id="trained, a sheet is open"),
        pytest.param(at(OPEN), Device("x", trained=0, judged=0), True, Wait(7.0), id="judged"),
        pytest.param(at(), Device("x"), False, Wait(7.0), id="no torch, nothing written"),
        pytest.param(at(OPEN), Device("x"), False, predict(0), id="no torch judges with the base"),
        pytest.param(at(OPEN), Device("x", judged=0), False, Wait(7.0), id="no torch, judged"),
        pytest.param(at(DONE), Device("x", trained=0, judged=0), True, LEARN_1, id="learns from what was decided"),
        pytest.param(at(DONE), Device("x"), True, LEARN_1, id="a late device skips to the newest"),
        pytest.param(at(DONE), Device("x", trained=1), True, Wait(7.0), id="a late device skips a decided sheet"),
        pytest.param(at(DONE, OPEN, tuned=1), Device("x", trained=1), True, predict(1), id="and judges the next"),
        pytest.param(at(DONE, OPEN, tuned=1), Device("x", trained=0, judged=0), True, LEARN_1, id="first learns, then judges"),
        pytest.param(at(DONE, DONE, tuned=1), Device("x", trained=1, judged=1), True, LEARN_2, id="learns to the last"),
        pytest.param(at(DONE, DONE, tuned=1), Device("x", trained=2), True, Finished(2, ""), id="it is over"),
        pytest.param(at(DONE, DONE, tuned=2), Device("x"), False, Finished(2, ""), id="it is over without torch"),
    ],
)
def test_what_a_device_does_next(state: State, device: Device, can_train: bool, work: Work) -> None:
    """Learn from what is decided, then judge what is not, each once; what was learned stays on the device."""
    assert crosslm.plan(RUN, state, device, can_train) == work


@pytest.mark.parametrize("feed", [(0,), (0, "0-a", "0-b", "0-c")], ids=["nothing was good", "everything was withdrawn"])
def test_a_feed_without_texts_is_none(feed: tuple[int | str, ...]) -> None:
    """Then devices learn as they do alone: the rate for judged texts is too much for labels alone."""
    state = at(replace(DONE, samples=3 if len(feed) > 1 else 0))
    work = crosslm.plan(RUN, replace(state, feed=feed), Device("x"), can_train=True)

    assert work == msgspec.structs.replace(LEARN_0, version=1)


def test_a_withdrawal_is_a_line_to_learn_from() -> None:
    """Devices ask for the feed up to its last line, withdrawals included, so that they drop what is withdrawn."""
    state = replace(at(DONE), feed=(0, "0-a"))
    work = crosslm.plan(RUN, state, Device("x"), can_train=True)

    assert isinstance(work, Train)
    assert work.synthetic == Mix(4, 0.5, 3, 0.5)


@pytest.mark.parametrize(
    ("tuned", "trained", "over"),
    [(2, (2, 2), True), (2, (2, -1), True), (2, (), True), (1, (2, 2), False), (2, (2, 1), False), (2, (2, 0), False)],
)
def test_a_run_is_over_when_all_have_learned(tuned: int, trained: tuple[int, ...], over: bool) -> None:
    """The LLM from every sheet, and each device that trains from the last one."""
    devices = tuple(Device("x", trained=version) for version in trained)

    assert crosslm.finished(RUN, at(DONE, DONE, tuned=tuned, devices=devices)) is over


def test_version_0_changes_nothing() -> None:
    """Every device starts from the same adapter, whose B is zero."""
    made = crosslm.start(RUN, factories.SPEC)

    assert strategies.same(made, factories.SPEC.start(40))


# A virtual run --------------------------------------------------------------------------------------------------------
def answer(state: State, device: str, work: Work, id: str) -> State:
    """The state once a device has done its work."""
    match work:
        case Train(version, share=True):
            event: object = coordinator.accept(state, Update(device, version, 1, {}), id, f"blob-{id}", 1, 99, 0.0)
        case Train(version):
            event = coordinator.keep(state, Trained(device, version, 1, {}), id)
        case Evaluate(version):
            event = coordinator.take(state, Evaluation(device, version, 1, {}), id)
        case Predict(number):
            event = coordinator.judge(state, Judgment(device, number, 1, {}), id, f"blob-{id}", 1)
        case _:
            return state
    assert not isinstance(event, Receipt)
    return coordinator.apply(state, event)  # type: ignore[arg-type]  # one of two events


def step(state: State, todo: Step, now: float) -> State:
    match todo:
        case WriteSheet(number):
            return coordinator.apply(state, Written(number, "t", "d", 9, 4, "", {}, now))
        case DecideSheet(number):
            return coordinator.apply(state, Decided(number, "j", 2, 0.5))
        case TuneLlm(number):
            return coordinator.apply(state, Tuned(number, f"llm{number}", 0.5))


@strategies.fuzzing
@given(
    st.lists(st.booleans(), min_size=1, max_size=5).filter(any),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 3),
    st.lists(st.integers(0, 9), max_size=60),
)
def test_every_run_ends(can_train: list[bool], versions: int, judges: int, averaged: int, order: list[int]) -> None:
    """Devices come in any order, then in turn; work done is never refused, and all who train end on the last version.

    Where more judges are asked for than there are devices, the deadline decides. Averaged versions may follow.
    """
    then = LpFl(versions=averaged, buffer_size=sum(can_train)) if averaged else None
    run = CrossLm(("{label}",), versions=versions, judges=judges, deadline_seconds=50.0, federated=then)
    devices = [f"d{i}" for i in range(len(can_train))]
    state = State()
    start: list[Event] = [Published(0, "a0", 0), *(Enrolled(device, "x") for device in devices)]
    for event in start:
        state = coordinator.apply(state, event)
    over: set[str] = set()
    for now, at in enumerate([*order, *range(400)]):
        while todo := crosslm.due(run, state, float(now)):
            state = step(state, todo, float(now))
        while batch := crosslm.averaged(run, state, 0.0):
            state = coordinator.apply(state, Published(state.version + 1, "a", len(batch)))
        device = devices[at % len(devices)]
        work = crosslm.plan(run, state, state.devices[device], can_train[at % len(devices)])
        if isinstance(work, Finished):
            over.add(device)
        state = answer(state, device, work, f"{now}")

    assert over == set(devices)
    assert crosslm.finished(run, state)
    last = versions + averaged - (averaged > 0)  # the last average is not trained on
    assert [state.devices[device].trained for device in devices] == [last if able else -1 for able in can_train]
    assert all(1 <= len(sheet.ballots) <= max(judges, 1) for sheet in state.sheets)
    assert (state.version, len(state.sheets), len(state.tuned)) == (versions + averaged, versions, versions)
    assert state.buffer == ()


# Settings -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("prompts", [("{label}",), ("a {label}", "{label} b")], [(), ("no place",), ("{label}", "no place")]),
        ("versions", [1, 99], [0, -1]),
        ("samples", [1, 10_000], [0, 10_001]),
        ("judges", [1, 99], [0, -1]),
        ("leash", [0, 99], [-1]),
        ("seed", [0, 99], [-1]),
        ("temperature", [0.01, 9.0], [0.0, -1.0, float("inf"), float("nan")]),
        ("top_p", [0.01, 1.0], [0.0, 1.01, float("nan")]),
        ("max_tokens", [1, 1000], [0, 1001]),
        ("quality", [0.01, 1.0], [0.0, 1.01, float("nan")]),
        ("weight", [0.0, 9.0], [-0.1, float("inf"), float("nan")]),
        ("batch_size", [1, 4096], [0, 4097]),
        ("label_temperature", [0.01, 1.0, 9.0], [0.0, -0.5, float("inf"), float("nan")]),
        ("wait_seconds", [0.01, 1e6], [0.0, float("inf"), float("nan")]),
        ("deadline_seconds", [0.01, 1e6], [0.0, float("inf"), float("nan")]),
    ],
)
def test_settings_have_bounds(key: str, good: list[Any], bad: list[Any]) -> None:
    """The bounds themselves are fine; what is beyond them is named."""
    for value in good:
        assert getattr(CrossLm(**{"prompts": ("{label}",), key: value}), key) == value
    for value in bad:
        with pytest.raises(SettingsError, match=key):
            CrossLm(**{"prompts": ("{label}",), key: value})


# Averaged versions after the last sheet -------------------------------------------------------------------------------
THEN = msgspec.structs.replace(RUN, federated=LpFl(versions=2, buffer_size=1, evaluate_every=0, seed=9))


def test_after_the_last_sheet_devices_average() -> None:
    """They learn from labels, soft labels (their schedule starts there) and the feed, send what changed, measure the last."""
    state = at(DONE, DONE, tuned=2)
    work = crosslm.plan(THEN, state, Device("x", trained=1, judged=1), can_train=True)

    assert isinstance(work, Train)
    assert work.share
    assert (work.version, work.synthetic) == (2, Mix(6, 0.5, 3, 0.5))
    assert work.soft is not None
    assert softlabels.size(work.soft, 2, 1000) == softlabels.size(SoftLabels(), 0, 1000) > 0
    assert crosslm.plan(THEN, state, Device("x", trained=2), can_train=True) == Wait(30.0)
    assert not crosslm.finished(THEN, state)
    waiting = Buffered("u", "d1", 4, 2)
    late, early = replace(at(DONE, DONE, tuned=1), buffer=(waiting,)), replace(at(DONE, tuned=1), buffer=(waiting,))
    assert crosslm.averaged(THEN, late, 0.0) == (waiting,)
    assert crosslm.due(THEN, late, 0.0) == TuneLlm(1)  # at the same time
    assert crosslm.averaged(THEN, state, 0.0) == crosslm.averaged(THEN, early, 0.0) == crosslm.averaged(RUN, late, 0.0) == ()
    over = replace(state, version=4, adapters=("a",) * 5)
    assert crosslm.plan(THEN, over, Device("x", trained=3), can_train=True) == Evaluate(4, "a")
    assert crosslm.plan(THEN, over, Device("x", trained=3, evaluated=4), can_train=True) == Finished(4, "a")
    assert not crosslm.finished(THEN, replace(over, devices=Map({"x": Device("x", trained=3)})))
    idle = {"x": Device("x", evaluated=4), "y": Device("only enrolled")}
    assert crosslm.finished(THEN, replace(over, devices=Map(idle)))
