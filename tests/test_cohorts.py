"""Secure averaging in a run: terms from settings, what each device does next, and vectors that become arrays again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import secure
from edge_sdk.adapters import AdapterSpec, Arrays, Slot
from edge_sdk.cohort import Join, Mask, Masked, Quorum, SealShares, Survivors, Terms, Unmask
from edge_sdk.errors import SettingsError
from edge_sdk.masking import Member, join, masked, receive, share, unmask_shares
from edge_sdk.protocol import Update
from edge_sdk.store import Store
from edge_server import cohorts, unmasking
from edge_server import settings as run_settings
from edge_server.cohorts import Secure
from edge_server.settings import AdapterSettings, RunSettings
from edge_server.systems.crosslm import CrossLm
from edge_server.systems.fedcollm import FedCoLlm
from edge_server.systems.lpfl import LpFl
from edge_server.unmasking import Cohort, Failed, Phase
from tests import factories, strategies

FREE = factories.SPEC
FROZEN = AdapterSpec(factories.SLOTS, rank=2, alpha=4.0, freeze_a=True)
UNEVEN = AdapterSpec((Slot("layer.10.value", 1, 3), Slot("layer.2.key", 5, 1), Slot("layer.0.query", 2, 2)), 3, 1.0)


# Terms ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("spec", "numbers"), [(FREE, 2 * (2 * 6 + 4 * 2)), (FROZEN, 2 * (4 * 2)), (UNEVEN, 12 + 18 + 12)])
def test_a_vector_has_a_place_for_every_number_of_an_update(spec: AdapterSpec, numbers: int) -> None:
    """Rank times inputs and outputs of every slot; with A frozen, the outputs alone."""
    assert cohorts.length(spec) == numbers


def test_terms_are_the_settings_for_this_adapter() -> None:
    """As many devices as a buffer, the settings' threshold, clip and weight, the adapter's length, and the name given."""
    settings = Secure(threshold=4, clip=0.5, max_weight=9, join_seconds=1.0, phase_seconds=2.0)

    assert cohorts.terms(settings, 5, FREE, "run-0-0", 10) == Terms("run-0-0", 5, 4, 40, 0.5, 9)


def test_an_update_counts_for_the_smaller_of_both_limits() -> None:
    """What a run says of examples holds with masks on, too."""
    assert [cohorts.terms(Secure(max_weight=9), 4, FREE, "c", most).max_weight for most in (1, 8, 9, 10_000)] == [1, 8, 9, 9]


def test_the_defaults_go_together() -> None:
    """What a file gets that only says [lpfl.secure]: three of four devices, updates cut at 1, 64 examples at most."""
    assert cohorts.terms(Secure(), LpFl().buffer_size, FREE, "c", LpFl().max_examples) == Terms("c", 4, 3, 40, 1.0, 64)


# What a device does next ---------------------------------------------------------------------------------------------
OF = Terms("one", size=10, threshold=7, length=4, clip=1.0, max_weight=8)
DEVICES = [f"d{i:x}" for i in range(1, 12)]
ANSWERED = {"advertise": 9, "share": 8, "upload": 7, "unmask": 7}  # da never joins, d9 shares nothing, d8 masks nothing


def walk(until: Phase) -> Cohort:
    """A cohort in this phase, which d1 has answered already."""
    cohort, members = Cohort(OF, deadline=10.0), dict[str, Member]()
    while cohort.phase != until:
        for device in DEVICES[: ANSWERED[cohort.phase]]:
            cohort = said(cohort, members, device)
        found = unmasking.advance(cohort, cohort.deadline, 10.0)
        assert isinstance(found, Cohort)
        cohort = found
    return cohort if until == "done" else said(cohort, members, "d1")


def said(cohort: Cohort, members: dict[str, Member], device: str) -> Cohort:
    """The cohort once this device has answered its phase."""
    match cohort.phase:
        case "advertise":
            members[device], keys = join(OF, device, device.encode() * 16)
            return unmasking.advertise(cohort, keys)
        case "share":
            members[device], shares = share(members[device], unmasking.roster(cohort))
            return unmasking.take_shares(cohort, shares)
        case "upload":
            opened = receive(members[device], unmasking.delivery(cohort, device))
            members[device], _ = masked(opened, np.zeros(4, np.float32), 1)
            return unmasking.take_masked(cohort, Masked("one", device), f"blob of {device}")
        case _:
            members[device], shown = unmask_shares(members[device], unmasking.survivors(cohort))
            return unmasking.take_reveal(cohort, shown)


def planned(state: unmasking.State) -> dict[str, Any]:
    """What each device is asked that is asked for anything."""
    found = {device: cohorts.plan(state, 3, device) for device in DEVICES}
    return {device: request for device, request in found.items() if request is not None}


def test_whoever_has_not_joined_is_asked_to() -> None:
    """Everybody but the one that has, with the cohort's terms and the version that was trained on."""
    assert planned(walk("advertise")) == {device: Join(3, OF) for device in DEVICES[1:]}


def test_nobody_is_asked_to_join_a_full_cohort() -> None:
    """With as many keys as places, whoever comes next waits."""
    cohort, members = Cohort(OF, deadline=10.0), dict[str, Member]()
    for device in DEVICES[:9]:
        cohort = said(cohort, members, device)

    assert planned(cohort) == {device: Join(3, OF) for device in ("da", "db")}
    assert planned(said(cohort, members, "da")) == {}


def test_whoever_has_joined_is_asked_for_shares() -> None:
    """All that sent keys get one roster of all keys; the one that has shared waits, and so do those that never joined."""
    cohort = walk("share")
    requests = planned(cohort)

    assert requests == {device: SealShares(3, unmasking.roster(cohort)) for device in DEVICES[1:9]}
    assert requests["d2"].roster.ids == DEVICES[:9]


def test_whoever_has_shared_is_asked_for_its_vector() -> None:
    """Each gets what its seven peers sealed for it, and nobody what is another's; d9, which shared nothing, waits."""
    cohort = walk("upload")
    requests = planned(cohort)

    assert requests == {device: Mask(3, unmasking.delivery(cohort, device)) for device in DEVICES[1:8]}
    for device, request in requests.items():
        assert request.delivery.device == device
        assert request.delivery.sealed.keys() == set(DEVICES[:8]) - {device}


def test_whoever_has_masked_is_asked_to_unmask() -> None:
    """One list for all: seven survived, d8 dropped; d8 itself is asked for nothing more."""
    assert planned(walk("unmask")) == {
        device: Unmask(3, Survivors("one", tuple(DEVICES[:7]), ("d8",))) for device in DEVICES[1:7]
    }


def test_nobody_is_asked_for_anything_at_the_end() -> None:
    """Neither once the sum can be had, nor in a cohort that has failed."""
    assert planned(walk("done")) == planned(Failed("one", "only 2 devices answered")) == {}


# Vectors and arrays --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spec", [FREE, FROZEN, UNEVEN])
@given(data=st.data())
def test_arrays_come_back_from_the_vector_a_device_makes(
    tmp_path_factory: pytest.TempPathFactory, spec: AdapterSpec, data: st.DataObject
) -> None:
    """unflatten is the inverse of what a device does to its update before it masks it, bit for bit, in any order of names."""
    arrays: Arrays = data.draw(strategies.adapters(spec.update_shapes()))
    shuffled = {name: arrays[name] for name in data.draw(st.permutations(list(arrays)))}
    store = Store(tmp_path_factory.getbasetemp() / "flat")
    secure.keep(store, Update("d", 3, 17, {}), shuffled)
    vector, weight = secure._learned(store, factories.manifest(spec), 3)
    store.close()

    assert (vector.shape, weight) == ((cohorts.length(spec),), 17)
    assert strategies.same(cohorts.unflatten(vector, spec), arrays)


def test_arrays_lie_in_the_order_of_their_names() -> None:
    """As text sorts them: layer 0, 10, 2, each A before B; and they are memory of their own."""
    vector = np.arange(cohorts.length(UNEVEN), dtype=np.float32)
    arrays = cohorts.unflatten(vector, UNEVEN)
    [slot_10, slot_2, slot_0] = UNEVEN.slots
    vector[:] = -1

    assert list(arrays) == [slot_0.a, slot_0.b, slot_10.a, slot_10.b, slot_2.a, slot_2.b]
    assert arrays[slot_0.a].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert arrays[slot_10.b].tolist() == [[15, 16, 17], [18, 19, 20], [21, 22, 23]]
    assert arrays[slot_2.b].tolist() == [[39, 40, 41]]


# Settings ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"join_seconds": 0.0}, "join_seconds"),
        ({"join_seconds": math.nan}, "join_seconds"),
        ({"join_seconds": math.inf}, "join_seconds"),
        ({"phase_seconds": -1.0}, "phase_seconds"),
        ({"phase_seconds": math.inf}, "phase_seconds"),
        ({"phase_seconds": math.nan}, "phase_seconds"),
    ],
)
def test_a_phase_without_an_end_is_refused(settings: dict[str, float], said: str) -> None:
    """A cohort waits for some time, and not for ever."""
    with pytest.raises(SettingsError, match=said):
        Secure(**settings)  # type: ignore[arg-type]  # floats all


@pytest.mark.parametrize(
    ("buffer_size", "settings", "said"),
    [
        (4, Secure(threshold=2), "more than two thirds"),
        (3, Secure(threshold=2), "more than two thirds"),
        (5, Secure(threshold=6), "more than two thirds"),
        (1, Secure(threshold=1), "2 to 128 devices"),
        (129, Secure(threshold=100), "2 to 128 devices"),
        (4, Secure(clip=0.0), "clip"),
        (4, Secure(clip=math.nan), "clip"),
        (4, Secure(max_weight=0), "max_weight"),
        (4, Secure(max_weight=10**6), "too coarse"),
        (4, Secure(clip=1e5), "too coarse"),
    ],
)
def test_settings_that_make_no_cohort_are_refused(buffer_size: int, settings: Secure, said: str) -> None:
    """Threshold, devices, clip and weight are looked at when the file is read, not when the first device has trained."""
    with pytest.raises(SettingsError, match=said):
        LpFl(buffer_size=buffer_size, max_examples=10**6, secure=settings)


@pytest.mark.parametrize(("buffer_size", "threshold"), [(2, 2), (3, 3), (4, 3), (5, 4), (128, 86), (4, 4)])
def test_the_smallest_threshold_is_more_than_two_thirds(buffer_size: int, threshold: int) -> None:
    """And all of them is the largest; both make a cohort."""
    made = LpFl(buffer_size=buffer_size, secure=Secure(threshold=threshold))

    assert cohorts.terms(made.secure or Secure(), buffer_size, FREE, "c", 64).threshold == threshold


def run_of(lpfl: LpFl, system: str = "lpfl", **adapter: Any) -> RunSettings:
    """Settings of a run whose averaging is `lpfl`, in whichever system."""
    crosslm = CrossLm(prompts=("a {label} day:",), federated=lpfl) if system == "crosslm" else None
    fedcollm = FedCoLlm("auxiliary.jsonl", lpfl) if system == "fedcollm" else None
    plain = lpfl if system == "lpfl" else LpFl()
    made = AdapterSettings(**adapter)
    return RunSettings(factories.ENCODER_TASK, system, made, plain, crosslm, fedcollm)  # type: ignore[arg-type]  # a Literal


UNSEEN = LpFl(secure=Secure())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LpFl(average="products", secure=Secure()), "take factors"),
        (lambda: run_of(UNSEEN, min_layers=1), "min_layers and min_rank"),
        (lambda: run_of(UNSEEN, min_rank=2), "min_layers and min_rank"),
        (lambda: run_of(UNSEEN, freeze_a=True, min_rank=2), "min_layers and min_rank"),
        (lambda: run_of(UNSEEN, "fedcollm", min_layers=1), "min_layers and min_rank"),
        (lambda: run_of(UNSEEN, "crosslm"), "crosslm.federated.secure"),
    ],
)
def test_what_needs_single_updates_is_refused(make: Any, said: str) -> None:
    """Products, parts of an adapter, and CrossLM's averaging do not go with sums of vectors that nobody has seen."""
    with pytest.raises(SettingsError, match=said):
        make()


@pytest.mark.parametrize("system", ["lpfl", "fedcollm"])
@pytest.mark.parametrize("freeze_a", [False, True])
def test_what_can_be_summed_is_a_run(system: str, freeze_a: bool) -> None:
    """Both systems that average take it, with A frozen or not, and it reaches what is averaged."""
    averaged = run_of(UNSEEN, system, freeze_a=freeze_a).averaged

    assert averaged is not None
    assert averaged.secure == Secure()


def test_devices_are_told_of_how_many_a_cohort_is() -> None:
    """As many as a buffer, and the threshold, in both systems that average unseen; nothing where updates are bare, or stay."""
    unseen = LpFl(buffer_size=7, secure=Secure(threshold=5))
    runs = [run_of(unseen), run_of(unseen, "fedcollm"), run_of(LpFl()), run_of(LpFl(), "fedcollm"), run_of(LpFl(), "crosslm")]
    told = [run_settings.manifest(run, factories.bundle()).secure for run in runs]

    assert told == [Quorum(7, 5), Quorum(7, 5), None, None, None]


def test_a_file_says_so_in_one_table(tmp_path: Path) -> None:
    """[lpfl.secure] reaches the run, and an unknown key in it is named."""
    task = '[task]\nlabels = ["bad", "good"]\npattern = "{text}"\nverbalizer = [["poor"], ["fine"]]\n'
    path = tmp_path / "run.toml"
    path.write_text(task + "[lpfl.secure]\nthreshold = 4\nclip = 0.5\nmax_weight = 9\njoin_seconds = 7\nphase_seconds = 8.5\n")

    assert run_settings.load(path).lpfl.secure == Secure(4, 0.5, 9, 7.0, 8.5)
    path.write_text(task + "[lpfl.secure]\nclipp = 0.5\n")
    with pytest.raises(SettingsError, match="clipp"):
        run_settings.load(path)


def test_plain_averaging_is_what_a_run_gets_that_does_not_ask() -> None:
    """No secure averaging by default, so devices do not need its package."""
    assert RunSettings(factories.ENCODER_TASK).lpfl.secure is None
    assert msgspec.structs.replace(UNSEEN, secure=None) == LpFl()
