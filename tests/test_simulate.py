"""Virtual time: the product's code, played by thousands of devices, against what can be reckoned on paper."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.adapters import Arrays
from edge_sdk.errors import SettingsError
from edge_sdk.verbs import Learned
from edge_server import forecast, simulate
from edge_server.aggregation import Contribution, fedbuff
from edge_server.cli import main
from edge_server.cohorts import Secure
from edge_server.simulate import Fleet, HalfNormal, Tiers, Version
from edge_server.systems.lpfl import LpFl
from tests import factories, strategies

MINILM = str(Path(__file__).parent.parent / "examples/minilm.toml")
EQUAL = Tiers(means=(100.0,), spread=0.0)
PLAIN = LpFl(versions=4, buffer_size=6, max_staleness=10_000, clip_norm=0.0, evaluate_every=0, wait_seconds=1.0)


def learn(version: int, adapter: Arrays, device: int, rng: np.random.Generator) -> Learned:
    """Something else for every device, version and start."""
    delta = {
        name: (array * 0.5 + rng.normal(0, 1, array.shape) + device + version).astype(np.float32)
        for name, array in adapter.items()
    }
    return Learned(delta, 1 + device, {"loss": float(device)})


def still(_version: int, adapter: Arrays, _device: int, _rng: np.random.Generator) -> Learned:
    """Learning that changes nothing and takes no time to compute."""
    return Learned({name: np.zeros_like(array) for name, array in adapter.items()}, 1, {})


def play(settings: LpFl, fleet: Fleet, how: simulate.Learn = still) -> list[Version]:
    return list(simulate.run(settings, factories.SPEC, fleet, how))


def changed(**changes: Any) -> LpFl:
    return msgspec.structs.replace(PLAIN, **changes)


# The arithmetic is the product's --------------------------------------------------------------------------------------
def test_equal_devices_and_a_full_buffer_are_fedavg_to_the_bit() -> None:
    """A plain loop over rounds and devices gives the same versions."""
    adapter: Arrays = factories.SPEC.start(PLAIN.seed)
    expected = [adapter]
    for version in range(PLAIN.versions):
        chance = [np.random.default_rng((1, 3, device, version)) for device in range(6)]
        learned = [learn(version, adapter, device, rng) for device, rng in enumerate(chance)]
        adapter = fedbuff(adapter, [Contribution(each.delta, each.num_examples, 0) for each in learned])
        expected.append(adapter)

    found = play(PLAIN, Fleet(6, EQUAL, seed=3), learn)
    assert len(found) == len(expected) == 5
    assert all(strategies.same(version.adapter, own) for version, own in zip(found, expected, strict=True))
    assert not strategies.same(found[1].adapter, found[2].adapter)


def test_a_version_says_what_it_was_made_of() -> None:
    """Who, from which base, how stale, and the updates' own numbers, weighted by their examples."""
    first, second, *_ = play(changed(buffer_size=2), Fleet(2, Tiers((100.0, 205.0), spread=0.0)), learn)

    assert (first.number, first.seconds, first.made_of, first.metrics) == (0, 0.0, (), {})
    assert (second.number, second.seconds, second.made_of) == (1, 210.0, ((0, 0), (1, 0)))
    assert second.staleness == {0: 2}
    assert second.metrics == {"loss": pytest.approx(2 / 3)}


def test_the_same_seed_gives_the_same_run_and_another_one_does_not() -> None:
    """To the last bit, with everything that chance has a hand in."""
    fleet = Fleet(12, HalfNormal(), dropout=0.2, away_seconds=50, gone=0.1, lost=0.1)
    one, same, other = (play(PLAIN, f, learn) for f in (fleet, fleet, msgspec.structs.replace(fleet, seed=1)))

    assert [(v.seconds, v.made_of, v.uploads) for v in one] == [(v.seconds, v.made_of, v.uploads) for v in same]
    assert all(strategies.same(a.adapter, b.adapter) for a, b in zip(one, same, strict=True))
    assert [v.seconds for v in one] != [v.seconds for v in other]


def test_secure_averaging_is_refused() -> None:
    """Cohorts have deadlines of their own, which are not played."""
    with pytest.raises(SettingsError, match=r"lpfl\.secure"):
        play(changed(buffer_size=4, secure=Secure(threshold=3)), Fleet(4))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Tiers, {"means": ()}),
        (Tiers, {"means": (1.0, 0.0)}),
        (Tiers, {"spread": -1.0}),
        (Tiers, {"communication": -1.0}),
        (HalfNormal, {"scale": 0.0}),
        (HalfNormal, {"communication": float("inf")}),
        (Fleet, {"devices": 0}),
        (Fleet, {"dropout": 1.0}),
        (Fleet, {"lost": 1.0}),
        (Fleet, {"gone": 1.1}),
        (Fleet, {"away_seconds": -1.0}),
        (Fleet, {"seed": -1}),
    ],
)
def test_settings_out_of_bounds_are_refused(kind: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        kind(**changes)


# Time is what paper says ----------------------------------------------------------------------------------------------
def test_a_synchronous_version_takes_as_long_as_its_slowest_device() -> None:
    """Three tiers: 400 s of training, 5 of communication, 1 until a waiting device asks again."""
    found = play(changed(buffer_size=30, versions=6), Fleet(30, Tiers(spread=0.0)))

    assert [version.seconds for version in found] == [0.0, *(405.0 + 406.0 * i for i in range(6))]
    assert {tuple(version.staleness.items()) for version in found[1:]} == {((0, 30),)}


def test_asynchronous_updates_come_at_the_sum_of_all_rates() -> None:
    """Every device trains all the time: 100 of each tier, one update in 105, 205 and 405 seconds from each."""
    found = play(changed(buffer_size=10, versions=600), Fleet(300, Tiers(spread=0.1)))
    rate = 100 * (1 / 105 + 1 / 205 + 1 / 405)
    settled, last = found[200], found[-1]

    assert (last.accepted - settled.accepted) / (last.seconds - settled.seconds) == pytest.approx(rate, rel=0.03)
    assert last.uploads == last.accepted == 6000 + last.buffered


def test_half_normal_trainings_take_what_their_mean_says() -> None:
    """scale * sqrt(2 / pi) on average, every one drawn anew for every device."""
    rng = np.random.default_rng(0)
    drawn = [simulate.training_seconds(HalfNormal(200.0), k % 3, rng) for k in range(20_000)]

    assert min(drawn) >= 0
    assert statistics.fmean(drawn) == pytest.approx(200 * (2 / np.pi) ** 0.5, rel=0.02)


def test_who_waits_asks_again_on_its_own_beat() -> None:
    """The fast device is done after 10 s and asks every 7; a version comes at 40, so it begins at 45 and fills the next at 55."""
    tiers = Tiers((10.0, 40.0, 45.0), spread=0.0, communication=0.0)
    found = play(changed(buffer_size=2, wait_seconds=7.0), Fleet(3, tiers))
    assert [(v.seconds, v.made_of) for v in found[1:3]] == [(40.0, ((0, 0), (1, 0))), (55.0, ((2, 0), (0, 1)))]

    alone = play(changed(buffer_size=1, wait_seconds=7.0), Fleet(1, Tiers((10.0,), spread=0.0, communication=0.0)))
    assert [version.seconds for version in alone] == [0.0, 10.0, 27.0, 44.0, 61.0]


# Who may train --------------------------------------------------------------------------------------------------------
def test_no_more_devices_train_than_may() -> None:
    """Six devices, two places: they take turns of 105 s, asking every second; without a limit all train at once."""
    limited = play(changed(buffer_size=2, concurrency=2), Fleet(6, EQUAL))
    free = play(changed(buffer_size=2), Fleet(6, EQUAL))

    assert [(v.seconds, {device for device, _ in v.made_of}) for v in limited[1:]] == [
        *((105.0, {0, 1}), (210.0, {2, 3}), (315.0, {4, 5}), (421.0, {0, 1})),
    ]
    assert {tuple(version.staleness) for version in limited[1:]} == {(0,)}
    assert [version.seconds for version in free[1:4]] == [105.0] * 3


def test_staleness_is_concurrency_over_the_buffers_size() -> None:
    """Little's law: 40 devices train at once, 10 make a version, so an update is about 4 versions old."""
    settings = changed(buffer_size=10, versions=150, concurrency=40, wait_seconds=20.0)
    settled = play(settings, Fleet(100, HalfNormal()))[30:]
    stale = sum((Counter(version.staleness) for version in settled), Counter[int]())

    assert sum(s * n for s, n in stale.items()) / stale.total() == pytest.approx(4.0, rel=0.1)


def test_the_place_of_a_device_that_is_gone_is_free_when_its_lease_ends() -> None:
    """The first of two devices begins and never comes back; the other waits 500 s for its place and trains 105."""
    fleet = next(f for f in (Fleet(2, EQUAL, gone=0.5, seed=s) for s in range(99)) if gone(f) == [True, False])
    found = play(changed(buffer_size=1, concurrency=1, lease_seconds=500.0), fleet)

    assert [(version.seconds, version.made_of) for version in found[:2]] == [(0.0, ()), (605.0, ((1, 0),))]


def test_a_deadline_ends_the_wait_of_a_synchronous_run() -> None:
    """Some of ten devices are gone: every version is made 600 s after its first update, of all that are left."""
    fleet = Fleet(10, EQUAL, gone=0.3, seed=1)
    left = gone(fleet).count(False)
    found = play(changed(buffer_size=10, max_staleness=0, deadline_seconds=600.0, least=left), fleet)

    assert 0 < left < 10
    assert [version.seconds for version in found] == [0.0, *(705.0 + 706.0 * i for i in range(4))]
    assert {len(version.made_of) for version in found[1:]} == {left}
    assert len(play(changed(buffer_size=10, deadline_seconds=600.0, least=left + 1), fleet)) == 1


def gone(fleet: Fleet) -> list[bool]:
    """Which devices of a fleet never answer: their first draw says so."""
    chances = (np.random.default_rng((0, fleet.seed, device)) for device in range(fleet.devices))
    return [float(chance.random()) < fleet.gone for chance in chances]


# What goes wrong ------------------------------------------------------------------------------------------------------
def test_devices_that_are_gone_stop_a_synchronous_run_and_no_asynchronous_one() -> None:
    """A round that waits for all waits for ever, and the simulation ends; a small buffer is filled by the others."""
    fleet = Fleet(40, Tiers(), gone=0.25)
    together, buffered = play(changed(buffer_size=40), fleet), play(changed(buffer_size=4, versions=50), fleet)

    assert [version.number for version in together] == [0]
    assert buffered[-1].number == 50
    assert 20 < len({device for version in buffered for device, _ in version.made_of}) < 40


def test_a_training_that_is_dropped_counts_as_wasted() -> None:
    """One in four comes to nothing; the device starts anew, and the run goes on."""
    last = play(changed(buffer_size=10, versions=200), Fleet(50, EQUAL, dropout=0.25, away_seconds=30.0))[-1]

    assert last.number == 200
    assert last.wasted == pytest.approx(0.25, abs=0.03)
    assert last.dropped / (last.accepted + last.dropped) == last.wasted


def test_a_slow_device_is_refused_where_staleness_is_bounded() -> None:
    """Its work is wasted, and it goes on with the newest version at once."""
    found = play(changed(buffer_size=1, versions=40, max_staleness=2), Fleet(11, Tiers((10.0,) * 10 + (95.0,), spread=0.0)))

    assert found[-1].refused >= 1
    assert all(device != 10 for version in found for device, _ in version.made_of)
    assert max(staleness for version in found for staleness in version.staleness) <= 2


def test_what_is_lost_on_the_way_is_sent_again_and_counts_once() -> None:
    """Lost requests and receipts cost uploads and time, never an update."""
    calm, lossy = (play(changed(buffer_size=20, versions=8), Fleet(20, EQUAL, lost=lost))[-1] for lost in (0.0, 0.3))

    assert calm.uploads == calm.accepted == lossy.accepted == 160
    assert lossy.uploads > 180
    assert lossy.seconds > calm.seconds
    assert lossy.wasted == 0


@given(
    devices=st.integers(1, 12),
    buffer_size=st.integers(1, 8),
    max_staleness=st.integers(0, 5),
    delays=st.sampled_from([EQUAL, Tiers(), HalfNormal()]),
    dropout=st.sampled_from([0.0, 0.3]),
    gone=st.sampled_from([0.0, 0.3]),
    lost=st.sampled_from([0.0, 0.3]),
    evaluate_every=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_every_accepted_update_is_used_once_or_waits(
    devices: int,
    buffer_size: int,
    max_staleness: int,
    delays: simulate.Delays,
    dropout: float,
    gone: float,
    lost: float,
    evaluate_every: int,
    seed: int,
) -> None:
    """Accepted = folded + buffered; nobody is in a run twice with one base, and nothing goes back in time."""
    settings = changed(buffer_size=buffer_size, max_staleness=max_staleness, evaluate_every=evaluate_every)
    found = play(settings, Fleet(devices, delays, dropout, 20.0, gone, lost, seed))
    used = Counter(pair for version in found for pair in version.made_of)

    assert set(used.values()) <= {1}
    assert [version.number for version in found] == list(range(len(found)))
    for before, after in itertools.pairwise(found):
        assert len(after.made_of) == buffer_size == sum(after.staleness.values())
        assert after.accepted == buffer_size * after.number + after.buffered
        assert after.uploads >= after.accepted + after.refused >= before.uploads * (lost == 0)
        assert after.seconds >= before.seconds
        assert max(after.staleness) <= max_staleness


@pytest.mark.slow
def test_ten_thousand_devices_take_less_than_half_a_minute() -> None:
    """Each of them trains at least once."""
    began = time.process_time()
    found = play(changed(buffer_size=500, versions=40), Fleet(10_000))

    assert found[-1].uploads >= 20_000
    assert len({device for version in found for device, _ in version.made_of}) > 9_000
    assert time.process_time() - began < 30


# The command ----------------------------------------------------------------------------------------------------------
Capture = pytest.CaptureFixture[str]
COMMAND = ["simulate", "--config", MINILM]


def test_the_command_forecasts_a_run(capsys: Capture) -> None:
    """Four devices fill minilm.toml's buffer of four: everything counts, nothing is stale."""
    assert main([*COMMAND, "--devices", "4", "--versions", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert (found["devices"], found["versions"], found["wanted"], found["uploads"]) == (4, 3, 3, 12)
    assert (found["staleness"], found["wasted"]) == ({"median": 0, "p90": 0, "p99": 0, "max": 0}, 0.0)
    assert found["versions_per_hour"] == pytest.approx(3 / found["hours"])
    assert found["versions_per_hour"] == pytest.approx(3600 / 405, rel=0.05)


def test_the_command_prints_a_table_without_control_characters(capsys: Capture) -> None:
    """One line a number, the same each time, and no progress line where nobody looks."""
    assert main([*COMMAND, "--devices", "9", "--buffer-size", "2", "--delays", "half-normal", "--scale", "50"]) == 0
    first = capsys.readouterr()
    assert main([*COMMAND, "--devices", "9", "--buffer-size", "2", "--delays", "half-normal", "--scale", "50"]) == 0

    assert first.err == ""
    assert capsys.readouterr().out == first.out
    assert first.out.replace("\n", "").isprintable()
    assert "versions an hour" in first.out
    assert "work wasted" in first.out


def test_the_command_says_when_a_run_stands_still(capsys: Capture) -> None:
    """Three devices never fill a buffer of four; that is what a forecast is for."""
    assert main([*COMMAND, "--devices", "3"]) == 0
    assert "stands still at version 0" in capsys.readouterr().out


def test_percentiles_are_values_that_occur() -> None:
    """Of 0, 0, 1 and 5: half are not above 0, three quarters not above 1."""
    counted = Counter({5: 1, 0: 2, 1: 1})

    assert [forecast.percentile(counted, share) for share in (0.5, 0.75, 0.76, 1.0)] == [0, 1, 5, 5]
    assert forecast.percentile(Counter(), 0.5) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        ["--devices", "0"],
        ["--versions", "0"],
        ["--buffer-size", "0"],
        ["--dropout", "1"],
        ["--means", "0"],
        ["--delays", "half-normal", "--scale", "-1"],
        ["--delays", "half-normal", "--means", "5"],
        ["--scale", "5"],
        ["--config", "nowhere.toml"],
        ["--config", str(Path(MINILM).parent / "fedmkt.toml")],
    ],
)
def test_wrong_arguments_end_with_2_and_one_line(wrong: list[str], capsys: Capture) -> None:
    """What is out of bounds, or belongs to other delays, or is no run that averages."""
    assert main([*COMMAND, *wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unknown_delays_end_with_2(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*COMMAND, "--delays", "uniform"])
    assert "--delays" in capsys.readouterr().err
