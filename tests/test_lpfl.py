"""What LP-FL asks of a device in which state, when a run is over, and what a version is made of."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from edge_sdk.adapters import Array
from edge_sdk.errors import DataError, SettingsError, WireError
from edge_sdk.protocol import Evaluate, Finished, Train, Update, Wait
from edge_sdk.training.batches import Training
from edge_server import coordinator
from edge_server.aggregation import Contribution
from edge_server.cohorts import Secure
from edge_server.coordinator import Accepted, Buffered, Device, State
from edge_server.robust import Krum, Median, NormBounded, TrimmedMean
from edge_server.systems import lpfl
from edge_server.systems.lpfl import LpFl
from tests import factories, strategies

EVERY = LpFl(versions=4, buffer_size=2, evaluate_every=1, wait_seconds=7.0, training=Training(steps=3), seed=40)
LAST_ONLY = LpFl(versions=4, buffer_size=2, evaluate_every=0)

devices = st.builds(Device, st.just("x"), trained=st.integers(-1, 9), evaluated=st.integers(-1, 9))


def at(version: int, *devices: Device, buffered: int = 0) -> State:
    buffer = tuple(Buffered(f"b{i}", f"d{i}", 1, 0) for i in range(buffered))
    adapters = tuple(f"a{v}" for v in range(version + 1))
    return State(version, adapters, buffer, Map({f"d{i}": device for i, device in enumerate(devices)}))


def test_a_device_measures_before_it_trains() -> None:
    """A newcomer measures the version it will start from."""
    assert lpfl.plan(EVERY, at(2), Device("x"), can_train=True) == Evaluate(2, "a2")


def test_a_device_that_has_measured_trains() -> None:
    """Training starts from the newest adapter, with the run's steps and a seed of its version."""
    work = lpfl.plan(EVERY, at(2), Device("x", trained=1, evaluated=2), can_train=True)

    assert work == Train(2, "a2", Training(steps=3), EVERY.soft, 40 + 1 + 2)


def test_a_device_that_has_contributed_waits() -> None:
    """Nothing more is asked of a device until there is a newer version."""
    assert lpfl.plan(EVERY, at(2), Device("x", trained=2, evaluated=2), can_train=True) == Wait(7.0)
    assert isinstance(lpfl.plan(EVERY, at(3), Device("x", trained=2, evaluated=3), can_train=True), Train)


def test_a_device_that_cannot_train_measures_and_waits() -> None:
    """A device without torch still takes part with numbers."""
    assert lpfl.plan(EVERY, at(2), Device("x", evaluated=1), can_train=False) == Evaluate(2, "a2")
    assert lpfl.plan(EVERY, at(2), Device("x", evaluated=2), can_train=False) == Wait(7.0)


def test_the_last_version_is_measured_and_then_it_is_over() -> None:
    """After the last version nobody trains; a device is told to stop once it has measured."""
    assert lpfl.plan(EVERY, at(4), Device("x", trained=3, evaluated=3), can_train=True) == Evaluate(4, "a4")
    assert lpfl.plan(EVERY, at(4), Device("x", trained=3, evaluated=4), can_train=True) == Finished(4, "a4")


def test_evaluate_every_0_measures_the_last_version_only() -> None:
    """Devices lose no time on measuring before the end, and measure the end."""
    assert [type(lpfl.plan(LAST_ONLY, at(v), Device("x"), can_train=True)) for v in range(5)] == [Train] * 4 + [Evaluate]


def test_evaluate_every_3_measures_the_first_every_third_and_the_last() -> None:
    """With 8 versions the versions 0, 3, 6 and 8 are measured."""
    settings = LpFl(versions=8, evaluate_every=3)
    measured = [v for v in range(9) if isinstance(lpfl.plan(settings, at(v), Device("x"), True), Evaluate)]

    assert measured == [0, 3, 6, 8]


@strategies.fuzzing
@given(devices, st.integers(0, 6), st.booleans(), st.integers(0, 3))
def test_no_work_is_ever_refused_later(device: Device, version: int, can_train: bool, every: int) -> None:
    """Whatever a device is asked to do, it has not done for this version, and it can do."""
    work = lpfl.plan(LpFl(versions=4, evaluate_every=every), at(version), device, can_train)

    match work:
        case Train():
            assert can_train
            assert device.trained < version < 4
        case Evaluate():
            assert device.evaluated < version
        case Finished():
            assert version >= 4
            assert device.evaluated >= version
        case Wait():
            assert version < 4
            assert device.trained >= version or not can_train


def test_a_run_is_finished_when_everybody_measured_the_last_version() -> None:
    """One device that has not measured the last version keeps the run open."""
    assert lpfl.finished(EVERY, at(4, Device("x", evaluated=4), Device("y", evaluated=4)))
    assert not lpfl.finished(EVERY, at(4, Device("x", evaluated=4), Device("y", evaluated=3)))
    assert not lpfl.finished(EVERY, at(3, Device("x", evaluated=3)))


def test_a_version_is_due_when_the_buffer_is_full() -> None:
    """One update of two makes nothing; of three, the two oldest are taken."""
    assert lpfl.averaged(EVERY, at(3, buffered=1), 0.0) == ()
    assert [b.blob for b in lpfl.averaged(EVERY, at(3, buffered=3), 0.0)] == ["b0", "b1"]


def test_late_updates_make_no_version_after_the_last() -> None:
    """A run of 4 versions ends at version 4: devices that were told so have left with it."""
    assert lpfl.averaged(EVERY, at(4, buffered=9), 0.0) == ()


def test_version_0_changes_nothing() -> None:
    """All of B is zero, so B A x is zero; the seed settles A."""
    adapter = lpfl.start(LpFl(seed=5), factories.SPEC)

    assert {name: array.shape for name, array in adapter.items()} == factories.SPEC.shapes()
    assert not any(adapter[slot.b].any() for slot in factories.SLOTS)
    assert all(adapter[slot.a].any() for slot in factories.SLOTS)
    assert all((array == lpfl.start(LpFl(seed=5), factories.SPEC)[name]).all() for name, array in adapter.items())
    assert (adapter[factories.SLOTS[0].a] != lpfl.start(LpFl(seed=6), factories.SPEC)[factories.SLOTS[0].a]).any()


def test_a_step_uses_the_runs_settings() -> None:
    """server_lr scales the step and max_examples caps the claim of 9999 examples: (2 * 1 + 1 * 4) / 3 / 2."""
    buffer = [Contribution({"w": np.array([value], np.float32)}, n, 0) for value, n in ((1.0, 9999), (4.0, 1))]
    new = lpfl.step(LpFl(server_lr=0.5, max_examples=2), factories.SPEC, {"w": np.array([10.0], np.float32)}, buffer)

    assert float(new["w"][0]) == 11.0


updates = st.tuples(st.integers(1, 5000), strategies.adapters(factories.SPEC.shapes(), st.floats(-10, 10, width=32)))


@given(st.lists(updates, min_size=1, max_size=6))
def test_a_synchronous_version_is_fedavg(sent: list[tuple[int, dict[str, Array]]]) -> None:
    """With a buffer of all devices and no staleness it is the mean of what they trained, weighted by examples (McMahan 2017)."""
    run = LpFl(buffer_size=len(sent), max_staleness=0, clip_norm=0.0)
    state = State(0, ("a0",), devices=Map({str(i): Device("x") for i in range(len(sent))}))
    for i, (examples, _) in enumerate(sent):
        assert lpfl.averaged(run, state, math.inf) == ()
        update = Update(str(i), 0, examples, {})
        event = coordinator.accept(state, update, f"u{i}", f"b{i}", 1, run.max_staleness, now=0.0)
        assert isinstance(event, Accepted)
        state = coordinator.apply(state, event)
    batch = lpfl.averaged(run, state, 0.0)
    assert [(each.blob, each.version) for each in batch] == [(f"b{i}", 0) for i in range(len(sent))]

    start = lpfl.start(run, factories.SPEC)
    found = lpfl.step(
        run, factories.SPEC, start, [Contribution(d, b.num_examples, 0) for b, (_, d) in zip(batch, sent, strict=True)]
    )
    total = sum(examples for examples, _ in sent)
    for name, array in found.items():
        trained = [examples * (start[name].astype(np.float64) + delta[name]) for examples, delta in sent]
        np.testing.assert_allclose(array, sum(trained) / total, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (LpFl(), False),
        (LpFl(rule=Median()), False),
        (LpFl(rule=TrimmedMean()), False),
        (LpFl(rule=NormBounded()), False),
        (LpFl(buffer_size=5, rule=Krum()), True),
        (LpFl(average="products"), True),
    ],
)
def test_a_step_needs_bases_only_where_it_says_so(settings: LpFl, wanted: bool) -> None:
    """Without them a version is the same, or, where they are wanted, cannot be made."""
    start = factories.SPEC.start(0)
    buffer = [Contribution(factories.SPEC.start(seed), 1, 0) for seed in range(1, 6)]
    assert lpfl.wants_bases(settings) is wanted
    if wanted:
        with pytest.raises(DataError, match="base"):
            lpfl.step(settings, factories.SPEC, start, buffer)
        return
    based = [replace(update, base=start) for update in buffer]
    without, told = (lpfl.step(settings, factories.SPEC, start, each) for each in (buffer, based))
    assert strategies.same(without, told)


def test_who_comes_late_to_a_synchronous_version_is_refused() -> None:
    """With a staleness of 0 an update of version 0 counts for version 1 or not at all."""
    state = State(1, ("a0", "a1"), devices=Map({"d1": Device("x")}))

    with pytest.raises(WireError) as refused:
        coordinator.accept(state, Update("d1", 0, 1, {}), "u", "b", 1, 0, now=0.0)
    assert refused.value.code == "too-stale"


def test_a_version_made_at_its_deadline_is_of_those_that_answered() -> None:
    """Two devices of four are enough after ten minutes; neither one nor nine minutes are."""
    run = LpFl(versions=4, buffer_size=4, max_staleness=0, deadline_seconds=600.0, least=2)

    assert [len(lpfl.averaged(run, at(1, buffered=n), 600.0)) for n in range(5)] == [0, 0, 2, 3, 4]
    assert [len(lpfl.averaged(run, at(1, buffered=n), 540.0)) for n in range(5)] == [0, 0, 0, 0, 4]
    assert lpfl.averaged(run, at(4, buffered=4), 600.0) == ()


@pytest.mark.parametrize(
    ("settings", "enough"),
    [
        (LpFl(buffer_size=4), 3),
        (LpFl(buffer_size=4, clip_norm=0.0), 1),
        (LpFl(buffer_size=2), 2),
        (LpFl(buffer_size=1), 1),
        (LpFl(buffer_size=9, rule=Krum()), 5),
        (LpFl(buffer_size=9, rule=Median(), clip_norm=0.0), 3),
        (LpFl(buffer_size=4, least=1), 1),
        (LpFl(buffer_size=9, rule=Krum(), least=7), 7),
    ],
)
def test_a_deadline_waits_for_as_many_as_can_be_compared(settings: LpFl, enough: int) -> None:
    """Unless told otherwise: three where sizes are held to their median, what the rule needs where that is more."""
    run = msgspec.structs.replace(settings, deadline_seconds=600.0)
    full = [n for n in range(10) if lpfl.averaged(run, at(1, buffered=n), 600.0)]

    assert full == list(range(enough, 10))


def test_at_a_deadline_one_device_cannot_destroy_the_adapter() -> None:
    """One update of 1e30 in every number makes no version alone, and beside two honest ones moves no further than they."""
    run, shapes = LpFl(buffer_size=4, deadline_seconds=10.0), factories.SPEC.shapes()
    sent = [{name: np.full(shape, size, np.float32) for name, shape in shapes.items()} for size in (1e30, 1e-3, 1e-3)]
    assert lpfl.averaged(run, at(0, buffered=1), math.inf) == ()
    batch = lpfl.averaged(run, at(0, buffered=3), math.inf)
    start = lpfl.start(run, factories.SPEC)
    new = lpfl.step(run, factories.SPEC, start, [Contribution(d, b.num_examples, 0) for b, d in zip(batch, sent, strict=True)])

    assert max(float(np.abs(new[name] - start[name]).max()) for name in shapes) < 1.1e-3


def test_what_would_be_refused_is_not_worth_training_on() -> None:
    """The oldest version of use lies `max_staleness` back; a cohort of secure averaging takes only the newest."""
    secure = LpFl(secure=Secure(threshold=3))

    assert lpfl.oldest(LpFl(max_staleness=2), at(5)) == 3
    assert lpfl.oldest(secure, at(5)) == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"least": -1}, "lpfl.least"),
        ({"least": 5}, "lpfl.least"),
        ({"deadline_seconds": -1.0}, "deadline_seconds"),
        *(({"deadline_seconds": value}, "deadline_seconds") for value in (math.nan, math.inf)),
        ({"lease_seconds": 0.0}, "lease_seconds"),
        ({"lease_seconds": math.inf}, "lease_seconds"),
        ({"concurrency": -1}, "concurrency"),
        ({"rule": Krum(), "buffer_size": 9, "deadline_seconds": 1.0, "least": 4}, "lpfl.least"),
        ({"secure": Secure(threshold=3), "deadline_seconds": 1.0}, "lpfl.deadline_seconds at 0"),
    ],
)
def test_limits_that_cannot_be_held_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        LpFl(**changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("versions", 0),
        ("buffer_size", 0),
        ("max_examples", 0),
        ("max_staleness", -1),
        ("evaluate_every", -1),
        *((name, value) for name in ("wait_seconds", "server_lr") for value in (0.0, -1.0, math.nan, math.inf)),
        *(("clip_norm", value) for value in (0.99, -1.0, math.nan, math.inf)),
    ],
)
def test_settings_out_of_bounds_are_refused(name: str, value: Any) -> None:
    """Each bound is checked where the setting is made, and the message names the setting."""
    with pytest.raises(SettingsError, match=name):
        LpFl(**{name: value})


@pytest.mark.parametrize(
    ("together", "words"),
    [
        ({"secure": Secure(), "rule": Median()}, "hides single updates, and lpfl.rule looks at each"),
        ({"secure": Secure(4), "rule": Krum(), "buffer_size": 5}, "hides single updates"),
        ({"secure": Secure(), "rule": NormBounded()}, "hides single updates"),
        ({"secure": Secure(), "upload": "int8"}, "has an encoding of its own"),
        ({"average": "products", "rule": Median()}, "take factors, or krum"),
        ({"average": "products", "rule": TrimmedMean()}, "take factors, or krum"),
        ({"average": "products", "upload": "int8"}, "take factors, or fp16"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(together: dict[str, Any], words: str) -> None:
    """With what to do instead; each alone is fine."""
    with pytest.raises(SettingsError, match=words):
        LpFl(**together)
    for name in together.keys() - {"buffer_size"}:
        LpFl(**{key: value for key, value in together.items() if key in (name, "buffer_size")})


@pytest.mark.parametrize("upload", ["fp32", "fp16", "int8"])
def test_devices_are_told_how_to_send(upload: Any) -> None:
    """The setting is in the work."""
    work = lpfl.plan(LpFl(upload=upload, evaluate_every=0), at(1), Device("x"), can_train=True)

    assert isinstance(work, Train)
    assert work.upload == upload


@pytest.mark.parametrize(
    "smallest",
    [
        *({"versions": 1}, {"buffer_size": 1}, {"max_staleness": 0}, {"evaluate_every": 0}, {"max_examples": 1}),
        *({"clip_norm": 0.0}, {"clip_norm": 1.0}, {"least": 0}, {"soft": None}),
    ],
)
def test_the_smallest_settings_are_allowed(smallest: dict[str, Any]) -> None:
    """A bound itself is inside."""
    settings = LpFl(**smallest)

    assert {name: getattr(settings, name) for name in smallest} == smallest


@pytest.mark.parametrize(
    ("how", "uncut"),
    [
        ({"buffer_size": 2}, True),
        ({"buffer_size": 3}, False),
        ({"buffer_size": 2, "clip_norm": 0.0}, False),
        ({"buffer_size": 3, "secure": Secure()}, False),
        ({"buffer_size": 4, "deadline_seconds": 10.0}, False),
        ({"buffer_size": 4, "deadline_seconds": 10.0, "least": 2}, True),
        ({"buffer_size": 4, "least": 2}, False),
    ],
)
def test_it_is_known_whether_a_version_may_go_uncut(how: dict[str, Any], uncut: bool) -> None:
    """Where fewer than three updates make a version and sizes were to be cut."""
    assert lpfl.uncut(LpFl(**how)) is uncut
