"""FedMKT as a system: whose word counts, who does what when, what the LLM learns from devices, and what it tells them."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map
from numpy.typing import NDArray
from safetensors.numpy import load_file

from edge_sdk import wire
from edge_sdk.errors import DataError, SettingsError, WireError
from edge_sdk.knowledge import LEVEL, class_nats, class_targets
from edge_sdk.protocol import Finished, Judgment, Lesson, Predict, Receipt, Sample, Text, Train, Trained, Wait, Work
from edge_sdk.tasks import Example
from edge_sdk.training import losses
from edge_sdk.training.batches import Classes, Training
from edge_server import coordinator
from edge_server import settings as run_settings
from edge_server.compute import JobFailed
from edge_server.coordinator import (
    Ballot,
    Decided,
    Device,
    Enrolled,
    Event,
    Judged,
    Published,
    Sheet,
    State,
    Tuned,
    Written,
)
from edge_server.llm.jobs import Label, LlmSettings, Outcome, Perplexity, Scores, Tune, Tuning
from edge_server.llm.jobs import Tuned as Learned
from edge_server.settings import RunSettings
from edge_server.storage import Blobs
from edge_server.systems import fedmkt
from edge_server.systems.fedmkt import AskAll, FedMkt, Learn, Say, Step
from edge_server.tutor import Tutor, sheet
from tests import factories, strategies
from tests import server_helpers as helpers
from tests.server_helpers import PUBLIC, Hang, Pupil, Simulator, judgment, with_public
from tests.test_settings import TASK, Lines, toml

Probabilities = NDArray[np.float32]
Room = tuple[list[int], Probabilities, list[Probabilities], float]


def rows(*some: tuple[float, ...]) -> Probabilities:
    return np.array(some, np.float32)


# Whom to believe ------------------------------------------------------------------------------------------------------
def test_targets_by_hand() -> None:
    """The first is taught by the first teacher, the second by the second, the third says it as well as any teacher."""
    own = rows((0.4, 0.6), (0.4, 0.6), (0.1, 0.9))
    first, second = rows((0.2, 0.8), (0.5, 0.5), (0.1, 0.9)), rows((0.3, 0.7), (1.8, 0.2), (0, 0))
    targets, chosen = class_targets([1, 0, 1], own, [first, second], 0.75)

    assert chosen.tolist() == [0, 1, -1]
    np.testing.assert_allclose(targets, [[0.05, 0.95], [0.975, 0.025], [0.0, 1.0]], rtol=1e-6)
    assert targets.dtype == np.float32


def test_a_liar_moves_a_label_no_further_than_the_teachers_weight() -> None:
    """It gives the label more than an honest teacher, and one wrong class all the rest: .9 + .1 * .5 stay with the label."""
    targets, chosen = class_targets([0], rows((0.45, 0.275, 0.275)), [rows((0.48, 0.26, 0.26)), rows((0.5, 0.5, 0))], 0.9)

    assert chosen.tolist() == [1]
    np.testing.assert_allclose(targets, [[0.95, 0.05, 0]], atol=1e-6)


@st.composite
def classrooms(draw: st.DrawFn) -> Room:
    """Labels, what a receiver and some teachers say (some rows nothing), and a weight."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    n, classes, count = draw(st.integers(1, 5)), draw(st.integers(2, 4)), draw(st.integers(0, 3))
    said = [rng.dirichlet([0.5] * classes, n).astype(np.float32) for _ in range(count + 1)]
    for teacher in said[1:]:
        teacher[rng.random(n) < 0.2] = 0
    return rng.integers(0, classes, n).tolist(), said[0], said[1:], draw(st.sampled_from([0.0, 0.25, 0.9, 1.0]))


def nats(said: Probabilities, label: int) -> float:
    return class_nats(Classes(said), label)


@strategies.fuzzing
@given(classrooms())
def test_only_who_says_a_label_better_teaches_it(room: Room) -> None:
    """Rows sum to 1; a teacher in them says the label better than the receiver, and no worse than any other."""
    labels, own, teachers, weight = room
    targets, chosen = class_targets(labels, own, teachers, weight)

    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    assert (targets >= 0).all()
    assert all(target[label] >= weight - 1e-6 for label, target in zip(labels, targets, strict=True))
    for i, (label, whose) in enumerate(zip(labels, chosen, strict=True)):
        alone, known = nats(own[i], label), [nats(teacher[i], label) for teacher in teachers]
        assert (whose >= 0) == any(cost < alone for cost in known)
        expected = np.eye(own.shape[1])[label]
        if whose >= 0:
            assert known[whose] == min(known)
            expected = weight * expected + (1 - weight) * teachers[whose][i]
        np.testing.assert_allclose(targets[i], expected, atol=1e-6)


@strategies.fuzzing
@given(classrooms(), st.sampled_from(["zero", "wrong", "equal"]), st.booleans())
def test_a_teacher_that_knows_nothing_or_lies_changes_nothing(room: Room, kind: str, first: bool) -> None:
    """Silence and another class said for sure never count; all classes alike only against who does worse than chance."""
    labels, own, teachers, weight = room
    n, classes = own.shape
    liar = np.full_like(own, {"zero": 0, "wrong": 1 / (classes - 1), "equal": 1 / classes}[kind])
    if kind == "wrong":
        liar[np.arange(n), labels] = 0
    if kind == "equal":
        own = np.where(own[np.arange(n), labels][:, None] < liar[0, 0], liar, own)
    with_liar = [liar, *teachers] if first else [*teachers, liar]

    assert (class_targets(labels, own, with_liar, weight)[0] == class_targets(labels, own, teachers, weight)[0]).all()


@given(classrooms())
def test_a_device_that_copies_the_labels_leaves_the_labels_alone(room: Room) -> None:
    """It says them better than anybody who learned something, so nobody else is heard: no harm, and no teaching."""
    labels, own, teachers, weight = room
    copied = np.eye(own.shape[1], dtype=np.float32)[labels]

    np.testing.assert_allclose(class_targets(labels, own, [*teachers, copied], weight)[0], copied, atol=LEVEL)


@given(classrooms())
def test_labels_alone_at_full_weight(room: Room) -> None:
    """With label_weight 1 no teacher is heard, whatever it says."""
    labels, own, teachers, _ = room

    assert (class_targets(labels, own, teachers, 1.0)[0] == np.eye(own.shape[1])[labels]).all()


@given(classrooms())
def test_cross_entropy_with_a_target_is_the_papers_loss(
    room: Room,
) -> None:
    """lambda * CE(label) + (1 - lambda) * CE(teacher) of whoever is chosen, loss and gradient alike; else CE(label)."""
    labels, own, teachers, weight = room
    targets, chosen = class_targets(labels, own, teachers, weight)
    scores = torch.tensor(np.log(own + 0.1), requires_grad=True)
    said = torch.from_numpy(np.stack([teachers[k][i] if k >= 0 else targets[i] for i, k in enumerate(chosen)]))
    share = torch.tensor([weight if k >= 0 else 1.0 for k in chosen])
    one = losses.classes(scores, torch.from_numpy(targets))
    two = share * losses.hard(scores, torch.tensor(labels)) + (1 - share) * losses.classes(scores, said)
    (grad_one,), (grad_two,) = (torch.autograd.grad(loss.sum(), scores) for loss in (one, two))

    np.testing.assert_allclose(one.detach(), two.detach(), atol=1e-5)
    np.testing.assert_allclose(grad_one, grad_two, atol=1e-5)


# Who does what when ---------------------------------------------------------------------------------------------------
RUN = FedMkt(
    "p.jsonl",
    versions=2,
    answers=2,
    deadline_seconds=100.0,
    max_staleness=1,
    alone=Training(steps=3),
    training=Training(steps=4),
    batch_size=5,
    label_weight=0.7,
    wait_seconds=7.0,
    seed=40,
)
OPEN = Sheet("texts", "texts", 90, 4, "", at=1000.0)
DONE = replace(OPEN, ballots=(Ballot("d0", "b0"),), judged="lines", acceptance=0.75)


def at(*sheets: Sheet, tuned: int = 0, devices: tuple[Device, ...] = ()) -> State:
    """A run with these sheets, whose LLM has learned from `tuned`."""
    version = sum(bool(sheet.judged) for sheet in sheets)
    known = Map({f"d{i}": device for i, device in enumerate(devices)})
    return State(version, ("a",) * (version + 1), (), known, sheets=sheets, tuned=("llm",) * tuned)


def answered(*devices: str) -> Sheet:
    return replace(OPEN, ballots=tuple(Ballot(device, f"blob of {device}") for device in devices))


@pytest.mark.parametrize(
    ("state", "now", "step"),
    [
        pytest.param(at(), 0.0, AskAll(0), id="nothing asked"),
        pytest.param(at(answered()), 1000.0, None, id="no answer"),
        pytest.param(at(answered("d0")), 1000.0, None, id="too few answers"),
        pytest.param(at(answered("d0", "d1")), 1000.0, Learn(0), id="enough answers"),
        pytest.param(at(answered("d0", "d1", "d2")), 1000.0, Learn(0), id="more than enough"),
        pytest.param(at(answered("d0")), 1099.9, None, id="just before the deadline"),
        pytest.param(at(answered("d0")), 1100.0, Learn(0), id="the deadline with one answer"),
        pytest.param(at(answered()), 9999.0, None, id="the deadline with none"),
        pytest.param(at(answered("d0", "d1"), tuned=1), 1000.0, Say(0), id="learned"),
        pytest.param(at(answered("d0"), tuned=1), 1000.0, Say(0), id="learned at a deadline"),
        pytest.param(at(DONE, tuned=1), 9999.0, AskAll(1), id="said"),
        pytest.param(at(DONE, answered("d0"), tuned=1), 1000.0, None, id="the second has too few"),
        pytest.param(at(DONE, answered("d0", "d1"), tuned=1), 1000.0, Learn(1), id="the second has enough"),
        pytest.param(at(DONE, answered("d0", "d1"), tuned=2), 1000.0, Say(1), id="learned again"),
        pytest.param(at(DONE, DONE, tuned=2), 9999.0, None, id="all said"),
    ],
)
def test_what_the_server_does_next(state: State, now: float, step: Step | None) -> None:
    """Ask, learn once enough have answered or time is up, say, and so on to the end."""
    assert fedmkt.due(RUN, state, now) == step


def lesson(version: int) -> Train:
    said = Lesson("lines", 4, 0.7, 5)
    return Train(version, "start", RUN.training, None, 40 + 1 + version, share=False, lesson=said)


ALONE = Train(0, "start", RUN.alone, None, 41, share=False)


def predict(number: int) -> Predict:
    return Predict(number, "start", "texts", 90, 4, "probabilities", 16)


@pytest.mark.parametrize(
    ("state", "device", "can_train", "work"),
    [
        pytest.param(at(), Device("x"), True, ALONE, id="a newcomer learns alone"),
        pytest.param(at(OPEN), Device("x"), True, ALONE, id="also while all are asked"),
        pytest.param(at(), Device("x", trained=0), True, Wait(7.0), id="trained, nothing asked"),
        pytest.param(at(OPEN), Device("x", trained=0), True, predict(0), id="trained, asked"),
        pytest.param(at(OPEN), Device("x", trained=0, judged=0), True, Wait(7.0), id="has answered"),
        pytest.param(at(OPEN, tuned=1), Device("x", trained=0), True, predict(0), id="late, but not too late"),
        pytest.param(at(), Device("x"), False, Wait(7.0), id="no torch, nothing asked"),
        pytest.param(at(OPEN), Device("x"), False, predict(0), id="no torch answers with the base"),
        pytest.param(at(OPEN), Device("x", judged=0), False, Wait(7.0), id="no torch, has answered"),
        pytest.param(at(DONE, tuned=1), Device("x", trained=0, judged=0), True, lesson(1), id="has a lesson of what was said"),
        pytest.param(at(DONE, tuned=1), Device("x"), True, lesson(1), id="a late device skips to the newest"),
        pytest.param(at(DONE, tuned=1), Device("x", trained=1), True, Wait(7.0), id="what is said is not asked for again"),
        pytest.param(at(DONE, OPEN, tuned=1), Device("x", trained=0, judged=0), True, lesson(1), id="first learns, then answers"),
        pytest.param(at(DONE, OPEN, tuned=1), Device("x", trained=1, judged=0), True, predict(1), id="and answers"),
        pytest.param(at(DONE, OPEN, tuned=1), Device("x", judged=0), False, predict(1), id="no torch answers again"),
        pytest.param(at(DONE, DONE, tuned=2), Device("x", trained=1, judged=1), True, lesson(2), id="learns to the last"),
        pytest.param(at(DONE, DONE, tuned=2), Device("x", trained=2), True, Finished(2, ""), id="it is over"),
        pytest.param(at(DONE, DONE, tuned=2), Device("x"), False, Finished(2, ""), id="it is over without torch"),
    ],
)
def test_what_a_device_does_next(state: State, device: Device, can_train: bool, work: Work) -> None:
    """Learn, then say what it makes of the texts, each once a version; what was learned stays on the device."""
    assert fedmkt.plan(RUN, state, device, can_train, "start") == work


def test_a_lesson_is_what_the_llm_said_last() -> None:
    """Version 2's is of the second sheet."""
    second = replace(DONE, judged="more lines", count=9)
    work = fedmkt.plan(RUN, at(DONE, second, tuned=2), Device("x"), True, "start")

    assert isinstance(work, Train)
    assert work.lesson == Lesson("more lines", 9, 0.7, 5)


@pytest.mark.parametrize(
    ("sheets", "trained", "over"), [(2, (2, 2), True), (2, (), True), (2, (2, 0), True), (1, (1, 1), False), (0, (), False)]
)
def test_a_run_is_over_when_the_llm_has_said_its_last(sheets: int, trained: tuple[int, ...], over: bool) -> None:
    """A device that trained once and vanished is not waited for; where it comes back it still gets the last lesson."""
    state = at(*[DONE] * sheets, tuned=sheets, devices=tuple(Device("x", trained=version) for version in trained))

    assert fedmkt.finished(RUN, state) is over
    if trained[-1:] == (0,):
        assert fedmkt.plan(RUN, state, state.devices["d1"], True, "start") == lesson(2)


@strategies.fuzzing
@given(st.lists(st.sets(st.sampled_from("abcd")), min_size=1, max_size=5), st.integers(0, 4))
def test_the_newest_answer_of_each_device_is_heard(present: list[set[str]], max_staleness: int) -> None:
    """Of every device that answered in the last `max_staleness` versions or now, the last answer, and no other."""
    run = msgspec.structs.replace(RUN, max_staleness=max_staleness)
    sheets = [replace(DONE, ballots=tuple(Ballot(d, f"{d}{i}") for d in sorted(who))) for i, who in enumerate(present)]
    number = len(sheets) - 1
    newest = {d: max(i for i, who in enumerate(present) if d in who) for d in set().union(*present)}
    expected = [(i, Ballot(d, f"{d}{i}")) for d, i in sorted(newest.items()) if number - i <= max_staleness]

    assert fedmkt.heard(run, at(*sheets), number) == expected


# A virtual run --------------------------------------------------------------------------------------------------------
def answer(state: State, device: str, work: Work, id: str) -> State:
    """The state once a device has done its work."""
    match work:
        case Train(version):
            event: object = coordinator.keep(state, Trained(device, version, 1, {}), id)
        case Predict(number):
            event = coordinator.judge(state, Judgment(device, number, 1, {}), id, f"blob-{id}", 1)
        case _:
            return state
    assert not isinstance(event, Receipt)
    return coordinator.apply(state, event)  # type: ignore[arg-type]  # one of two events


def after(state: State, step: Step, now: float) -> State:
    match step:
        case AskAll(number):
            return coordinator.apply(state, Written(number, "t", "t", 9, 4, "", {}, now))
        case Learn(number):
            return coordinator.apply(state, Tuned(number, f"llm{number}", 0.5))
        case Say(number):
            return coordinator.apply(state, Decided(number, f"said{number}", 0, 0.5))


@strategies.fuzzing
@given(
    st.lists(st.booleans(), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(1, 6),
    st.lists(st.integers(0, 9), max_size=60),
)
def test_every_run_ends(can_train: list[bool], versions: int, answers: int, order: list[int]) -> None:
    """Devices come in any order, then in turn: no work is refused, steps keep their order, who trains ends on the last version.

    Where more answers are asked for than there are devices, the deadline decides.
    """
    run = FedMkt("p", versions=versions, answers=answers, deadline_seconds=50.0)
    devices = [f"d{i}" for i in range(len(can_train))]
    state, steps, over = State(), list[Step](), set[str]()
    start: list[Event] = [Published(0, "a0", 0), *(Enrolled(device, "x") for device in devices)]
    for event in start:
        state = coordinator.apply(state, event)
    for now, who in enumerate([*order, *range(400)]):
        while step := fedmkt.due(run, state, float(now)):
            steps.append(step)
            state = after(state, step, float(now))
        device = devices[who % len(devices)]
        work = fedmkt.plan(run, state, state.devices[device], can_train[who % len(devices)], "start")
        if isinstance(work, Train) and work.version:
            assert work.lesson is not None
            assert work.lesson.blob == f"said{work.version - 1}"
        if isinstance(work, Finished):
            over.add(device)
        state = answer(state, device, work, f"{now}")

    assert steps == [kind(number) for number in range(versions) for kind in (AskAll, Learn, Say)]
    assert over == set(devices)
    assert fedmkt.finished(run, state)
    assert [state.devices[device].trained for device in devices] == [versions if able else -1 for able in can_train]
    assert (state.version, len(state.sheets), len(state.tuned)) == (versions, versions, versions)
    assert all(sheet.ballots for sheet in state.sheets)


# Settings -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("public", ["p"], [""]),
        ("versions", [1, 99], [0, -1]),
        ("answers", [1, 99], [0, -1]),
        ("max_staleness", [0, 99], [-1]),
        ("seed", [0, 99], [-1]),
        ("label_weight", [0.0, 1.0], [-0.01, 1.01, float("nan")]),
        ("batch_size", [1, 4096], [0, 4097]),
        ("llm_batch_size", [1, 4096], [0, 4097]),
        ("passes", [1, 10_000], [0, 10_001]),
        ("learning_rate", [0.01, 1.0], [0.0, 1.01, float("nan")]),
        ("wait_seconds", [0.01, 1e6], [0.0, float("inf"), float("nan")]),
        ("deadline_seconds", [0.01, 1e6], [0.0, float("inf"), float("nan")]),
    ],
)
def test_settings_have_bounds(key: str, good: list[Any], bad: list[Any]) -> None:
    """The bounds themselves are fine; what is beyond them is named."""
    for value in good:
        assert getattr(FedMkt(**{"public": "p", key: value}), key) == value
    for value in bad:
        with pytest.raises(SettingsError, match=key):
            FedMkt(**{"public": "p", key: value})


def test_an_llm_behind_an_address_cannot_learn() -> None:
    """Nobody can train it, so it is refused."""
    with pytest.raises(SettingsError, match=r"fedmkt\.llm\.endpoint cannot be trained"):
        FedMkt("p", llm=LlmSettings(endpoint="http://127.0.0.1:8000/v1"))


FEDMKT: dict[str, Lines] = {"": {"system": '"fedmkt"'}, "task": TASK, "fedmkt": {"public": '"p.jsonl"'}}


def test_public_texts_are_all_a_file_needs(tmp_path: Path) -> None:
    """Everything else has a default; nothing is averaged, and devices are told nothing of the file."""
    loaded = run_settings.load(toml(tmp_path, FEDMKT))
    bundle = msgspec.structs.replace(factories.bundle(), task=loaded.task)
    made = run_settings.manifest(loaded, bundle)

    assert (loaded.system, loaded.fedmkt, loaded.averaged, made.system) == ("fedmkt", FedMkt("p.jsonl"), None, "fedmkt")
    assert b"p.jsonl" not in wire.encode(made)


def test_the_example_is_fine() -> None:
    """`examples/fedmkt.toml` can be read; it leaves it to each bundle which layers there are."""
    loaded = run_settings.load(Path(__file__).parent.parent / "examples" / "fedmkt.toml")

    assert loaded.fedmkt is not None
    assert (loaded.system, loaded.fedmkt.public, loaded.adapter.modules) == ("fedmkt", "public.jsonl", ())
    assert fedmkt.due(loaded.fedmkt, State(0), 0.0) == AskAll(0)


@pytest.mark.parametrize("section", ["", ".alone", ".training", ".llm"])
def test_an_unknown_key_is_named(tmp_path: Path, section: str) -> None:
    """As everywhere in the file."""
    name = f"fedmkt{section}"
    with pytest.raises(SettingsError, match=r"run\.toml: .*`colour`"):
        run_settings.load(toml(tmp_path, {**FEDMKT, name: {**FEDMKT.get(name, {}), "colour": "1"}}))


def test_a_file_without_the_table_or_its_texts_is_refused(tmp_path: Path) -> None:
    """What is missing is said by its name."""
    for tables, said in (
        ({"": FEDMKT[""], "task": TASK}, r"needs a table \[fedmkt\] with at least `public`"),
        ({**FEDMKT, "fedmkt": {}}, "missing required field `public`"),
    ):
        with pytest.raises(SettingsError, match=rf"run\.toml: .*{said}"):
            run_settings.load(toml(tmp_path, tables))


def test_each_model_is_asked_in_its_own_words() -> None:
    """A device reads its bundle's task, not the run's; a bundle for other labels is refused."""
    run = RunSettings(factories.DECODER_TASK, "fedmkt", fedmkt=FedMkt("p"))
    told = [run_settings.manifest(run, factories.bundle(kind)).task for kind in ("encoder", "decoder")]
    other = msgspec.structs.replace(factories.ENCODER_TASK, labels=("positive", "negative"))

    assert told == [factories.ENCODER_TASK, factories.DECODER_TASK]
    with pytest.raises(SettingsError, match="a bundle's labels are positive, negative, the run's negative, positive"):
        run_settings.manifest(run, msgspec.structs.replace(factories.bundle(), task=other))


# The public texts -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("two\nlines", "text 1 has a character that is not printable, U\\+000A; take it out"),
        ("a\u200db", "U\\+200D ZERO WIDTH JOINER"),
        ("x" * 10_001, "text 1 cannot be sent: .* 1 to 10000"),
    ],
)
def test_texts_that_no_device_takes_are_refused_at_once(text: str, said: str) -> None:
    """A run that all devices would refuse for ever does not begin; which text it is, and which character, is said."""
    with pytest.raises(SettingsError, match=said):
        sheet([PUBLIC[0], Example(text, 1)])


def test_no_more_bytes_than_devices_take() -> None:
    """1,677 texts of ten thousand characters are more than sixteen mebibytes, with their names."""
    long = Example("x" * 10_000, 1)
    assert len(sheet([long] * 1_600)) < wire.MAX_SHEET
    with pytest.raises(SettingsError, match=r"devices take 16777216 bytes, these texts are 168\d{5}; leave some out"):
        sheet([long] * 1_677)


@pytest.mark.parametrize(
    ("count", "classes", "said"),
    [
        (5_000, 100, ""),
        (10_000, 110, "devices would say 1116384 bytes of 10000 texts, 1048576 travel; use fewer"),
        (8_000, 100, r"what the LLM says of 8000 texts may have \d{8} bytes, devices take 16777216; use fewer"),
    ],
)
def test_no_more_is_said_of_classes_than_travels(tmp_path: Path, count: int, classes: int, said: str) -> None:
    """A run of which a judgment or a lesson would be refused does not begin."""
    labels = tuple(f"c{i}" for i in range(classes))
    task = msgspec.structs.replace(factories.DECODER_TASK, labels=labels, verbalizer=tuple((label,) for label in labels))
    public = (Example("x", 0),) * count
    tutor = Tutor(FedMkt("p"), task, public, Blobs(tmp_path), Pupil(), lambda: 0.0, {})
    with pytest.raises(SettingsError, match=said) if said else contextlib.nullcontext():
        tutor.check()


def test_no_more_texts_than_devices_take() -> None:
    """As many as a message may have, and not one more."""
    many = [Example("so happy", 1)] * wire.MAX_TEXTS
    assert len(wire.unpack_lines(sheet(many), Text)) == wire.MAX_TEXTS
    with pytest.raises(SettingsError, match="at most 10000 texts, these are 10001"):
        sheet([*many, many[0]])


# The tutor ------------------------------------------------------------------------------------------------------------
class Desk:
    """A tutor on a folder, and the run it works for."""

    def __init__(self, folder: Path, llm: Simulator | None = None, **settings: Any) -> None:
        run = with_public(**settings)
        assert run.fedmkt is not None
        self.folder, self.settings, self.llm, self.blobs = folder, run.fedmkt, llm or Pupil(), Blobs(folder)
        self.tutor = Tutor(run.fedmkt, run.task, PUBLIC, self.blobs, self.llm, lambda: 1000.0, {})
        self.state = State()
        start: list[Event] = [Published(0, "a0", 0), *(Enrolled(f"d{i}", "x") for i in range(4))]
        for event in start:
            self.apply(event)

    def apply(self, event: Event) -> None:
        self.state = coordinator.apply(self.state, event)

    async def do(self, step: Step) -> Any:
        """Carries a step out and applies what came of it."""
        event = await self.tutor.carry_out(step, self.state)
        self.apply(event)
        return event

    def texts(self) -> list[Text]:
        return wire.unpack_lines(self.blobs.get(self.state.sheets[-1].texts), Text)

    def hear(self, device: str, kind: str = "honest", **more: Any) -> None:
        """A device says what it makes of the public texts."""
        body = judgment(device, len(self.state.sheets) - 1, self.texts(), kind, **more)
        message = self.tutor.read(body, self.state)
        decision = coordinator.judge(self.state, message, f"{device} {message.version}", self.blobs.put(body), len(body))
        assert isinstance(decision, Judged)
        self.apply(decision)

    async def whole(self, number: int, *devices: str) -> None:
        await self.do(AskAll(number))
        for device in devices:
            self.hear(device)
        await self.do(Learn(number))
        await self.do(Say(number))

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def taught(self) -> Probabilities:
        """The targets of the last lesson."""
        job = next(job for job in reversed(self.llm.jobs) if isinstance(job, Tune))
        assert [lesson.text for lesson in job.lessons.labelled] == [example.text for example in PUBLIC]
        return np.array([lesson.probabilities for lesson in job.lessons.labelled])


RIGHT, LEFT = 230 / 256, 26 / 256  # .9 and .1 in 256 levels


def expected(*shares: float) -> Probabilities:
    """Targets of `PUBLIC`, by what each teacher gives the label; 0 for no teacher."""
    rows = [[0.0, 1.0] if example.label else [1.0, 0.0] for example in PUBLIC]
    for row, example, share in zip(rows, PUBLIC, shares, strict=True):
        if share:
            label = example.label or 0
            row[label], row[1 - label] = 0.9 + 0.1 * share, 0.1 * (1 - share)
    return np.array(rows, np.float32)


async def test_all_are_asked_the_same(tmp_path: Path) -> None:
    """The texts in order with their labels, the same bytes each time, and when they were asked."""
    desk = Desk(tmp_path)
    event = await desk.do(AskAll(0))
    again = await desk.tutor.carry_out(AskAll(1), desk.state)

    assert event == Written(0, event.texts, event.texts, len(desk.blobs.get(event.texts)), 5, "", {}, 1000.0)
    assert desk.texts() == [Text(f"p{i}", example.text, example.label or 0) for i, example in enumerate(PUBLIC)]
    assert isinstance(again, Written)
    assert (again.sheet, again.texts) == (1, event.texts)
    assert desk.llm.jobs == []


async def test_the_llm_learns_from_who_says_a_label_best(tmp_path: Path) -> None:
    """An honest device teaches what it says better than the LLM; one that turns everything around, the text that is meant so."""
    desk = Desk(tmp_path)
    await desk.do(AskAll(0))
    desk.hear("d1", "inverted")
    desk.hear("d0", "honest")
    event = await desk.do(Learn(0))
    ask, tune = desk.llm.jobs

    np.testing.assert_allclose(desk.taught(), expected(RIGHT, RIGHT, RIGHT, RIGHT, RIGHT), rtol=1e-6)
    assert ask == Label("", tuple(example.text for example in PUBLIC))
    assert isinstance(tune, Tune)
    assert (tune.adapter, tune.seed) == ("", 3)
    assert tune.tuning == Tuning(3, 2, 5e-4, generation=0.0, contrast="none", leash=0.0)  # three steps of two are five texts
    assert (tune.lessons.good, tune.lessons.pairs, tune.lessons.leash) == ((), (), ())
    assert event == Tuned(0, event.adapter, 0.5)
    assert load_file(tmp_path / event.adapter)["seeds"].tolist() == [3]


@pytest.mark.parametrize(
    ("kinds", "shares"),
    [
        (("honest",), (RIGHT, RIGHT, RIGHT, RIGHT, 0)),
        (("inverted",), (0, 0, 0, 0, RIGHT)),
        (("constant",), (RIGHT, 0, RIGHT, 0, 0)),
        (("inverted", "honest", "inverted"), (RIGHT,) * 5),
    ],
)
async def test_a_lesson_is_what_was_better_said(tmp_path: Path, kinds: tuple[str, ...], shares: tuple[float, ...]) -> None:
    """Liars teach nothing that the LLM says better by itself; what nobody says better is learned by its label."""
    desk = Desk(tmp_path)
    await desk.do(AskAll(0))
    for i, kind in enumerate(kinds):
        desk.hear(f"d{i}", kind)
    await desk.do(Learn(0))

    np.testing.assert_allclose(desk.taught(), expected(*shares), rtol=1e-6)


@pytest.mark.parametrize(("max_staleness", "share"), [(0, 0), (1, RIGHT), (2, RIGHT)])
async def test_what_an_absent_device_said_last_counts(tmp_path: Path, max_staleness: int, share: float) -> None:
    """While it is not too old; the answer to the last of three versions is the only new one."""
    desk = Desk(tmp_path, max_staleness=max_staleness, versions=3)
    await desk.whole(0, "d0")
    await desk.do(AskAll(1))
    desk.hear("d1", "inverted")
    await desk.do(Learn(1))

    np.testing.assert_allclose(desk.taught(), expected(share, share, share, share, RIGHT), rtol=1e-6)


async def test_each_lesson_goes_on_from_the_last(tmp_path: Path) -> None:
    """Its adapter, its own view and its next answers are those of what it has learned so far; every version has its seed."""
    desk = Desk(tmp_path, passes=2)
    await desk.whole(0, "d0")
    await desk.whole(1, "d0")
    files = [str(tmp_path / adapter) for adapter in desk.state.tuned]

    assert [(type(job), job.adapter) for job in desk.llm.jobs if isinstance(job, Tune | Label)] == [
        (Label, ""),
        (Tune, ""),
        (Label, files[0]),
        (Label, files[0]),
        (Tune, files[0]),
        (Label, files[1]),
    ]
    assert [job.tuning.steps for job in desk.llm.jobs if isinstance(job, Tune)] == [6, 6]
    assert [Pupil.lessons(file).tolist() for file in files] == [[3], [3, 4]]
    np.testing.assert_allclose(load_file(files[1])["targets"], expected(RIGHT, RIGHT, RIGHT, RIGHT, 0), rtol=1e-6)
    assert desk.names() == {*desk.state.tuned, *(s.texts for s in desk.state.sheets), *(s.judged for s in desk.state.sheets)} | {
        ballot.blob for s in desk.state.sheets for ballot in s.ballots
    }


async def test_a_surer_llm_is_taught_no_more(tmp_path: Path) -> None:
    """What it says better than devices do it learns by its label alone; only where it is sure and wrong they still help."""
    desk = Desk(tmp_path, versions=4)
    for number in range(3):
        await desk.whole(number, "d0")  # before the third it gives its mood .95

    np.testing.assert_allclose(desk.taught(), expected(0, 0, 0, 0, LEFT), rtol=1e-6)


async def test_what_the_llm_says_is_told_with_labels(tmp_path: Path) -> None:
    """A line a text: its label by name, the probabilities of the LLM that has learned, and what it gives the label."""
    desk = Desk(tmp_path)
    await desk.whole(0, "d0")
    event = desk.state.sheets[0]
    lines = wire.unpack_lines(desk.blobs.get(event.judged), Sample)
    sure = float(np.float32(1 / (1 + np.exp(-2.0))))

    assert [(line.seq, line.id, line.text) for line in lines] == [(i + 1, f"p{i}", e.text) for i, e in enumerate(PUBLIC)]
    assert [line.label for line in lines] == ["positive", "negative", "positive", "negative", "negative"]
    assert [line.quality for line in lines] == pytest.approx([sure] * 4 + [1 - sure])
    assert [line.soft[1] for line in lines] == pytest.approx([sure, 1 - sure, sure, 1 - sure, sure])
    assert {(line.version, line.model, line.adapter) for line in lines} == {(0, "simulated", desk.state.tuned[0])}
    assert (event.samples, event.acceptance) == (0, 0.8)
    assert (desk.state.version, desk.state.adapter) == (1, "a0")


@pytest.mark.parametrize("step", [Learn(0), Say(0)])
@pytest.mark.parametrize(
    ("trouble", "error", "said"),
    [
        (JobFailed("out of memory"), JobFailed, "out of memory"),
        (OSError("no space left"), OSError, "no space left"),
        (Perplexity(1.0), DataError, "the LLM's process answered Perplexity"),
    ],
)
async def test_an_llm_that_fails_or_talks_nonsense_changes_nothing(
    tmp_path: Path, step: Step, trouble: Exception | Outcome, error: type[Exception], said: str
) -> None:
    """At either of its jobs: the error reaches the caller, no half file is left, and the same step succeeds later."""
    desk = Desk(tmp_path)
    await desk.do(AskAll(0))
    desk.hear("d0")
    if isinstance(step, Say):
        await desk.do(Learn(0))
    before = desk.names()
    own = Scores(((0.0, 0.0),) * len(PUBLIC))
    for troubles in ([trouble], [own, trouble])[: 1 + isinstance(step, Learn)]:
        desk.llm.troubles += troubles
        with pytest.raises(error, match=said):
            await desk.tutor.carry_out(step, desk.state)
        assert desk.names() == before
    assert desk.llm.troubles == []
    await desk.do(step)


async def test_answers_for_another_job_are_no_answers(tmp_path: Path) -> None:
    """Scores where a lesson was asked for, and a lesson's end where scores were."""
    desk = Desk(tmp_path)
    await desk.do(AskAll(0))
    desk.hear("d0")
    scores = Scores(((0.0, 0.0),) * len(PUBLIC))
    for troubles, name in (([scores, scores], "Scores"), ([Learned(0.5, 0.0)], "Tuned")):
        desk.llm.troubles += list(troubles)
        with pytest.raises(DataError, match=f"the LLM's process answered {name}"):
            await desk.tutor.carry_out(Learn(0), desk.state)


async def test_a_lesson_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    """A server that is stopped in the middle of one has no files lying around."""
    desk = Desk(tmp_path)
    await desk.do(AskAll(0))
    desk.hear("d0")
    before = desk.names()
    desk.llm.troubles += [Scores(((0.0, 0.0),) * len(PUBLIC)), Hang()]
    job = asyncio.create_task(desk.tutor.carry_out(Learn(0), desk.state))
    await helpers.until(lambda: len(desk.llm.jobs) == 2)
    assert len(desk.names()) == len(before) + 1
    job.cancel()
    await asyncio.wait([job])

    assert job.cancelled()
    assert desk.names() == before


async def test_what_is_lost_is_named(tmp_path: Path) -> None:
    """The base is not taken for what was learned, nor silence for an answer."""
    desk = Desk(tmp_path)
    await desk.whole(0, "d0")
    (tmp_path / desk.state.sheets[0].ballots[0].blob).unlink()
    await desk.do(AskAll(1))
    with pytest.raises(DataError, match=f"blob {desk.state.sheets[0].ballots[0].blob} is missing"):
        await desk.do(Learn(1))
    (tmp_path / desk.state.tuned[0]).unlink()
    with pytest.raises(DataError, match=f"blob {desk.state.tuned[0][:12]} is missing"):
        await desk.do(Learn(1))


# What devices send ----------------------------------------------------------------------------------------------------
def body(device: str = "d0", number: int = 0, answer: Any = None, **more: Any) -> bytes:
    said = np.full((len(PUBLIC), 2), 128, np.uint8) if answer is None else answer
    return wire.pack_judgment(Judgment(device, number, 10, more.pop("metrics", {}), **more), said)


@pytest.mark.parametrize(
    ("sent", "code", "status"),
    [
        (body(answer=np.zeros((4, 2), np.uint8)), "wrong-shape", 422),
        (body(answer=np.zeros((5, 1), np.uint8)), "wrong-shape", 422),
        (body(answer=np.zeros((5, 3), np.uint8)), "wrong-shape", 422),
        (body(number=1), "unknown-sheet", 409),
        (body(covers=(2,)), "bad-message", 400),
        (body(covers=(-1,)), "bad-message", 400),
        (b"nothing of the kind", "bad-tensors", 400),
    ],
)
async def test_an_answer_that_cannot_be_used_is_refused(tmp_path: Path, sent: bytes, code: str, status: int) -> None:
    """Another number of texts or classes, texts nobody asked about, classes that are none: with a name, and nothing is kept."""
    desk = Desk(tmp_path)
    await desk.do(AskAll(0))
    with pytest.raises(WireError) as refused:
        desk.tutor.read(sent, desk.state)

    assert (refused.value.code, refused.value.status) == (code, status)
    assert desk.tutor.read(body(covers=(0, 1)), desk.state) == Judgment("d0", 0, 10, {}, (0, 1))


@pytest.mark.parametrize(
    ("liar", "claims"),
    [("inverted", {"accuracy": 1.0}), ("inverted", {"accuracy": 0.0}), ("honest", {"accuracy": 1e9}), ("honest", {})],
)
async def test_what_a_device_claims_of_itself_changes_nothing(tmp_path: Path, liar: str, claims: dict[str, float]) -> None:
    """Neither accuracy nor number of examples nor classes: what it says of each text is measured by the server."""
    lessons = []
    for name, more in (("claims", {"metrics": claims, "num_examples": 9_999_999, "covers": (0,)}), ("modest", {})):
        (tmp_path / name).mkdir()
        desk = Desk(tmp_path / name)
        await desk.do(AskAll(0))
        desk.hear("d0", liar, **more)
        desk.hear("d1", "honest")
        lessons.append((await desk.do(Learn(0))).adapter)

    assert lessons[0] == lessons[1]


async def test_silence_teaches_nothing(tmp_path: Path) -> None:
    """A device that gives no class anything is taken in, and the LLM learns by labels."""
    desk = Desk(tmp_path)
    await desk.do(AskAll(0))
    message = desk.tutor.read(said := body(answer=np.zeros((5, 2), np.uint8)), desk.state)
    decision = coordinator.judge(desk.state, message, "id", desk.blobs.put(said), len(said))
    assert isinstance(decision, Judged)
    desk.apply(decision)
    await desk.do(Learn(0))

    np.testing.assert_allclose(desk.taught(), expected(0, 0, 0, 0, 0))
