"""What a device does for no server, whatever it is asked."""

from __future__ import annotations

import msgspec
import pytest

from edge_sdk import consent
from edge_sdk.cohort import Delivery, Join, Mask, Quorum, Roster, SealShares, Survivors, Terms, Unmask
from edge_sdk.errors import WireError
from edge_sdk.protocol import Evaluate, Finished, Manifest, Predict, Train, Work
from edge_sdk.training.batches import Training
from tests import factories

PLAIN = factories.manifest()
SECURE = msgspec.structs.replace(PLAIN, secure=Quorum(7, 5))
TERMS = Terms("c-1", 7, 5, 40, 1.0, 64)
BARE = Train(0, "ab" * 32, Training(), None, seed=0)
MASKED = msgspec.structs.replace(BARE, share=False, masked=True)
KEPT = msgspec.structs.replace(BARE, share=False)
COHORT = (
    Join(0, TERMS),
    SealShares(0, Roster(TERMS, ())),
    Mask(0, Delivery("c-1", "d", {})),
    Unmask(0, Survivors("c-1", (), ())),
)
HARMLESS = (KEPT, Evaluate(0, "ab" * 32), Predict(0, "ab" * 32, "ef" * 32, 100, 2, "agree"), Finished(2, "cd" * 32))


def refusal(manifest: Manifest, work: Work, only_secure: bool = False) -> str:
    """What it says of this after its code; nothing where it does it."""
    try:
        consent.check(manifest, work, only_secure)
    except WireError as error:
        return str(error).removeprefix("not-secure: ")
    return ""


@pytest.mark.parametrize("only_secure", [False, True])
def test_what_each_run_may_ask(only_secure: bool) -> None:
    """A plain run bare updates, a secure one masked ones and its cohorts, and both what shares nothing."""
    assert [refusal(SECURE, work, only_secure) for work in (MASKED, *COHORT, *HARMLESS)] == [""] * 9
    assert [refusal(PLAIN, work, only_secure) for work in HARMLESS] == [""] * 4
    assert refusal(PLAIN, BARE, only_secure) == (
        "this device shares what it learned only in secure averaging, as its owner wants" if only_secure else ""
    )


def test_a_secure_run_gets_no_bare_update() -> None:
    """Whoever owns the device; and what is masked is not bare, whatever else the request says."""
    assert refusal(SECURE, BARE) == "this run averages unseen, and the server asks for the update by itself"
    assert refusal(SECURE, BARE, only_secure=True).startswith("this device shares")
    assert refusal(SECURE, msgspec.structs.replace(MASKED, share=True), only_secure=True) == ""


def test_a_run_that_does_not_say_so_averages_nothing_unseen() -> None:
    """Its cohorts would be of any size."""
    for work in (MASKED, *COHORT):
        assert refusal(PLAIN, work) == "this run's manifest says nothing of secure averaging"


@pytest.mark.parametrize(("size", "threshold"), [(2, 2), (6, 5), (7, 6), (8, 6), (128, 86)])
def test_a_cohort_is_what_the_manifest_says(size: int, threshold: int) -> None:
    """Neither smaller nor larger: places more than there should be may all be the server's."""
    other = msgspec.structs.replace(TERMS, size=size, threshold=threshold)

    assert refusal(SECURE, Join(0, other)) == "the cohort has another size or threshold than the manifest says"


def test_a_run_stays_what_it_was() -> None:
    """Once a run averages unseen, no other manifest of it is taken; another run, or one that begins to, is another matter."""
    of = msgspec.structs.replace
    for changed in (PLAIN, of(SECURE, secure=Quorum(2, 2)), of(SECURE, secure=Quorum(7, 6))):
        with pytest.raises(WireError) as refused:
            consent.check_manifest(SECURE, changed)
        assert refused.value.code == "not-secure"
    consent.check_manifest(None, PLAIN)
    consent.check_manifest(SECURE, of(SECURE, min_rank=1))
    consent.check_manifest(PLAIN, SECURE)
    consent.check_manifest(SECURE, of(PLAIN, run="another"))
