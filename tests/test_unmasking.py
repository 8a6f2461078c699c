"""The server's side of secure averaging: every pattern of dropouts, what the server can and cannot know, and all refusals."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_sdk.cohort import SHARE, Masked, Shares, Terms
from edge_sdk.errors import WireError
from edge_sdk.masking import (
    PRIME,
    Floats,
    Member,
    Ring,
    add_mask,
    binding,
    decode,
    encode,
    join,
    lagrange,
    masked,
    pack,
    pair_key,
    receive,
    recover,
    self_key,
    share,
    unmask_shares,
)
from edge_server.unmasking import (
    PHASES,
    Cohort,
    Failed,
    Phase,
    State,
    advance,
    advertise,
    current,
    delivery,
    roster,
    survivors,
    take_masked,
    take_reveal,
    take_shares,
    unmask,
)
from tests import strategies

LENGTH = 7


def terms(size: int, threshold: int, cohort: str = "one") -> Terms:
    return Terms(cohort, size, threshold, LENGTH, clip=4.0, max_weight=64)


def ids(size: int) -> list[str]:
    return [f"d-{k:02}" for k in range(size)]


def private(device: str) -> tuple[Floats, int]:
    """What a device has learned, and from how many examples."""
    rng = np.random.default_rng(int(device[2:]))
    return rng.normal(0, 1, LENGTH).astype(np.float32), int(rng.integers(1, 80))


@dataclass(frozen=True, eq=False)
class Stage:
    """A cohort after some phases, with its devices and the masked vectors."""

    state: State
    members: dict[str, Member]
    vectors: dict[str, Ring]

    @property
    def cohort(self) -> Cohort:
        return current(self.state)


def blob(vector: Ring) -> str:
    return hashlib.sha256(pack(vector)).hexdigest()


@functools.cache
def stage(of: Terms, *answered: frozenset[str]) -> Stage:
    """The cohort after as many phases as there are sets, each answered by these devices until its deadline."""
    if not answered:
        return Stage(Cohort(of, deadline=10.0), {}, {})
    before = stage(of, *answered[:-1])
    if isinstance(before.state, Failed):
        return before
    cohort, members, vectors = before.state, dict(before.members), dict(before.vectors)
    for id in sorted(answered[-1], reverse=True):  # devices answer in any order
        members[id], message, vector = answer(of, id, *answered[:-1])
        match cohort.phase:
            case "advertise":
                cohort = advertise(cohort, message)
            case "share":
                cohort = take_shares(cohort, message)
            case "upload":
                cohort, vectors[id] = take_masked(cohort, message, blob(vector)), vector
            case "unmask":
                cohort = take_reveal(cohort, message)
    return Stage(advance(cohort, cohort.deadline, 10.0), members, vectors)


@functools.cache
def answer(of: Terms, id: str, *before: frozenset[str]) -> tuple[Member, Any, Ring]:
    """What a device becomes and sends in the phase after these, and the vector beside it."""
    cohort, members, nothing = stage(of, *before).cohort, stage(of, *before).members, np.empty(0, np.uint32)
    match len(before):
        case 0:
            return *join(of, id, hashlib.sha256(id.encode()).digest()), nothing
        case 1:
            return *share(members[id], roster(cohort)), nothing
        case 2:
            member, vector = masked(receive(members[id], delivery(cohort, id)), *private(id))
            return member, Masked(of.cohort, id), vector
    return *unmask_shares(members[id], survivors(cohort)), nothing


def everybody(size: int, phases: int) -> tuple[frozenset[str], ...]:
    return (frozenset(ids(size)),) * phases


def plain(devices: frozenset[str]) -> tuple[Floats, int]:
    """The weighted mean of what these devices have learned, in float64."""
    values, weights = zip(*(private(id) for id in sorted(devices)), strict=True)
    counted = np.minimum(weights, 64)
    return np.average(np.clip(np.stack(values).astype(np.float64), -4, 4), axis=0, weights=counted), int(counted.sum())


def check_sum(after: Stage, uploaded: frozenset[str]) -> None:
    mean, weight = unmask(after.cohort, (after.vectors[id] for id in sorted(uploaded)))
    expected, weights = plain(uploaded)

    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, expected, atol=after.cohort.terms.error, rtol=0)
    assert weight == weights


def refusal(call: Callable[..., object], *arguments: object) -> str:
    """The code it refuses these with."""
    with pytest.raises(WireError) as caught:
        call(*arguments)
    return caught.value.code


# Dropouts ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "threshold", "most"), [(4, 3, 4), (5, 4, 5), (7, 5, 3)])
def test_every_pattern_of_dropouts(size: int, threshold: int, most: int) -> None:
    """Each device leaves before any phase or never, `most` of them at most: with the threshold left the mean is that of those
    that uploaded, else the cohort has failed in the first phase that fewer answered."""
    of = terms(size, threshold)
    worked = set()
    for last in itertools.product(range(5), repeat=size):
        if size - last.count(4) > most:
            continue
        answered = tuple(frozenset(id for id, k in zip(ids(size), last, strict=True) if k > phase) for phase in range(4))
        after = stage(of, *answered)
        short = [phase for phase, devices in zip(PHASES, answered, strict=False) if len(devices) < threshold]
        if short:
            assert isinstance(after.state, Failed)
            assert (
                f"only {len(answered[PHASES.index(short[0])])} devices answered in the phase `{short[0]}`" in after.state.reason
            )
        else:
            assert after.cohort.phase == "done"
            if answered not in worked:
                check_sum(after, answered[2])
            worked.add(answered)

    assert len(worked) == {4: 17, 5: 21, 7: 365}[size]


def test_a_large_cohort() -> None:
    """32 devices, of which two leave in every phase."""
    everyone = ids(32)
    answered = [frozenset(everyone[2 * k :]) for k in range(1, 5)]
    after = stage(terms(32, 22), *answered)

    assert len(after.cohort.reveals) == 24
    check_sum(after, answered[2])


@given(st.data(), st.integers(3, 5))
def test_whatever_was_learned_the_mean_is_the_plain_one(data: st.DataObject, size: int) -> None:
    """Any finite vectors and weights; what is beyond the clip is cut."""
    threshold = size * 2 // 3 + 1
    before = stage(terms(size, threshold), *everybody(size, 2))
    cohort, members, vectors, learned = before.cohort, {}, {}, []
    for id in ids(size):
        values = np.array(data.draw(st.lists(strategies.floats32, min_size=LENGTH, max_size=LENGTH)), np.float32)
        learned.append((values, data.draw(st.integers(1, 2**40))))
        members[id], vectors[id] = masked(receive(before.members[id], delivery(cohort, id)), *learned[-1])
        cohort = take_masked(cohort, Masked("one", id), blob(vectors[id]))
    cohort = current(advance(cohort, 0.0, 10.0))
    for id in ids(size)[:threshold]:
        cohort = take_reveal(cohort, unmask_shares(members[id], survivors(cohort))[1])
    mean, _ = unmask(current(advance(cohort, 0.0, 10.0)), vectors.values())

    weights = [min(weight, 64) for _, weight in learned]
    expected = np.average([np.clip(values.astype(np.float64), -4, 4) for values, _ in learned], axis=0, weights=weights)
    assert np.abs(mean - expected).max() <= 1e-4


# What the server can know --------------------------------------------------------------------------------------------
UPLOADED = (*everybody(5, 2), frozenset(ids(5)[:4]))
DONE = stage(terms(5, 4), *UPLOADED, frozenset(ids(5)[:4]))


def known_masks(cohort: Cohort, device: str) -> Ring:
    """All masks of a device's upload that the server can make from what it was sent: the own one, and those with the dropped."""
    bound, total = binding(roster(cohort)), np.zeros(LENGTH + 1, np.uint32)
    speakers = {x: cohort.reveals[id] for x, id in enumerate(sorted(cohort.adverts), 1) if id in cohort.reveals}
    factors = lagrange(speakers)
    seed = recover({x: int.from_bytes(said.seeds[device]) for x, said in speakers.items()}, factors).to_bytes(32)
    add_mask(total, self_key(seed, bound, device), 1)
    for gone in cohort.shares.keys() - cohort.uploads.keys():
        key = recover({x: int.from_bytes(said.keys[gone]) for x, said in speakers.items()}, factors).to_bytes(32)
        public = cohort.adverts[device].mask_key
        add_mask(total, pair_key(key, public, bound, gone, device), 1 if device < gone else -1)
    return total


def pair_mask(members: dict[str, Member], cohort: Cohort, device: str, peer: str) -> Ring:
    """What two devices alone can make; here of all that the others hold of the first one's key."""
    total = np.zeros(LENGTH + 1, np.uint32)
    points = {id: x for x, id in enumerate(sorted(cohort.adverts), 1)}
    held = {points[id]: int.from_bytes(members[id].inbox[device][SHARE:]) for id in cohort.uploads}
    key = recover(held, lagrange(held)).to_bytes(32)
    add_mask(total, pair_key(key, cohort.adverts[peer].mask_key, binding(roster(cohort)), device, peer), 1)
    return total


@pytest.mark.parametrize(("u", "v"), list(itertools.combinations(ids(5)[:4], 2)))
def test_the_servers_view_fits_other_vectors(u: str, v: str) -> None:
    """All the server has, and all that every other device knows, fits any other vector and weight of u as well.

    By construction: give u another vector, v what keeps their sum, and the mask that only u and v can make what keeps both
    uploads. Every upload stays as it is, and so does all else: no message depends on the vectors or on this mask. So as far as
    this one mask is as good as random (X25519, HKDF, AES), the view says no more of u and v than their sum. A mask the server can
    make itself could not be chosen so; that it cannot is checked by what is left of the uploads when all those are taken off.
    """
    cohort = DONE.cohort
    encoded = {id: encode(*private(id), cohort.terms) for id in cohort.uploads}
    masks = {pair: pair_mask(DONE.members, cohort, *pair) for pair in itertools.combinations(sorted(cohort.uploads), 2)}

    def uploads(encoded: dict[str, Ring], masks: dict[tuple[str, str], Ring]) -> dict[str, list[int]]:
        found = {id: encoded[id] + known_masks(cohort, id) for id in cohort.uploads}
        for (low, high), mask in masks.items():
            found[low], found[high] = found[low] + mask, found[high] - mask
        return {id: vector.tolist() for id, vector in found.items()}

    view = {id: vector.tolist() for id, vector in DONE.vectors.items()}
    assert uploads(encoded, masks) == view
    total = private(u)[1] + private(v)[1]
    other = encode(np.linspace(-0.1, 0.1, LENGTH).astype(np.float32), min(total - 1, 5), cohort.terms)
    rest = encoded[u] + encoded[v] - other
    shift = other - encoded[u]
    changed = uploads(encoded | {u: other, v: rest}, masks | {(u, v): masks[u, v] - shift})

    assert shift.all()
    assert 1 <= rest[-1] <= 2 * 64
    assert (np.abs(rest[:-1].view(np.int32).astype(np.int64)) <= 2 * 64 * 4 * cohort.terms.scale).all()
    assert changed == view


def test_uploads_without_one_say_nothing() -> None:
    """Take any upload out of the sum, and all known masks off: what is left is still masked. With all four it is the mean."""
    cohort = DONE.cohort
    stripped = {id: DONE.vectors[id] - known_masks(cohort, id) for id in cohort.uploads}
    for count in (1, 2, 3):
        for some in itertools.combinations(stripped.values(), count):
            left = np.sum(some, axis=0, dtype=np.uint32)
            assert refusal(decode, left, cohort.terms, count) == "bad-sum"

    mean, _ = decode(np.sum(list(stripped.values()), axis=0, dtype=np.uint32), cohort.terms, 4)
    np.testing.assert_allclose(mean, plain(UPLOADED[2])[0], atol=1e-4)


def test_a_vector_that_came_too_late_stays_masked() -> None:
    """Its sender was declared dropped, so the server has its key and can make all its masks with others, but not its own."""
    cohort, gone = DONE.cohort, ids(5)[4]
    _, late = masked(receive(DONE.members[gone], delivery(cohort, gone)), *private(gone))
    for id in cohort.uploads:
        pair = pair_mask(DONE.members, cohort, gone, id)
        late = late + pair if id < gone else late - pair

    assert refusal(take_masked, cohort, Masked("one", gone), "late") == "too-late"
    assert refusal(decode, late, cohort.terms, 1) == "bad-sum"
    assert all(gone not in reveal.seeds for reveal in cohort.reveals.values())


# Phases --------------------------------------------------------------------------------------------------------------
def test_a_phase_ends_with_its_last_answer_or_its_deadline() -> None:
    """Before both nothing happens; the new deadline counts from now; the last phase waits for the threshold only."""
    of = terms(4, 3)
    cohort = Cohort(of, deadline=10.0)
    for id in ids(4):
        assert advance(cohort, 9.9, 5.0) is cohort
        cohort = advertise(cohort, join(of, id, hashlib.sha256(id.encode()).digest())[1])
    after = advance(cohort, 3.0, 5.0)
    assert isinstance(after, Cohort)
    assert (after.phase, after.deadline) == ("share", 8.0)

    uploaded = stage(of, *everybody(4, 3))
    reveals = [unmask_shares(uploaded.members[id], survivors(uploaded.cohort))[1] for id in ids(4)]
    two = take_reveal(take_reveal(uploaded.cohort, reveals[3]), reveals[1])
    assert advance(two, 0.0, 5.0) is two
    assert current(advance(take_reveal(two, reveals[0]), 0.0, 5.0)).phase == "done"
    failed = advance(two, uploaded.cohort.deadline, 5.0)
    assert failed == Failed("one", "only 2 devices answered in the phase `unmask`, this cohort needs 3", revealed=True)
    assert advance(failed, 0.0, 5.0) is failed
    assert refusal(current, failed) == "cohort-failed"
    done = stage(of, *everybody(4, 4)).state
    assert advance(done, 1e9, 5.0) is done


@pytest.mark.parametrize(("phase", "revealed"), [("advertise", False), ("share", False), ("upload", False), ("unmask", True)])
def test_shares_may_be_revealed_once_they_were_asked_for(phase: Phase, revealed: bool) -> None:
    """A cohort that fails in its last phase says so, though nobody's answer may have come; before it nobody was asked."""
    failed = advance(Cohort(terms(4, 3), 10.0, phase), 10.0, 5.0)

    assert isinstance(failed, Failed)
    assert failed.revealed == revealed


def test_an_answer_counts_once() -> None:
    """The same bytes again change nothing, in this phase or later; other bytes are refused."""
    done = stage(terms(4, 3), *everybody(4, 4)).cohort
    for number in range(4):
        cohort = stage(terms(4, 3), *everybody(4, number + 1)).cohort
        id = "d-01"
        advert, shares, reveal = cohort.adverts[id], done.shares[id], done.reveals[id]
        other = join(cohort.terms, id, bytes(32))[1]
        swapped = dict(zip(shares.sealed, reversed(shares.sealed.values()), strict=True))
        for late in (cohort, done):
            match number:
                case 0:
                    assert advertise(late, advert, {advert.mask_key}) is late
                    assert refusal(advertise, late, other) == "already-answered"
                case 1:
                    changed = Shares("one", id, swapped)
                    assert take_shares(late, shares) is late
                    assert refusal(take_shares, late, changed) == "already-answered"
                case 2:
                    assert take_masked(late, Masked("one", id), done.uploads[id]) is late
                    assert refusal(take_masked, late, Masked("one", "d-01"), "other") == "already-answered"
                case 3:
                    false = msgspec.structs.replace(reveal, seeds=dict.fromkeys(reveal.seeds, bytes(SHARE)))
                    assert take_reveal(late, reveal) is late
                    assert refusal(take_reveal, late, false) == "already-answered"


def test_an_answer_belongs_to_its_phase() -> None:
    """Too early, too late, by a device that never was in, or that dropped out before."""
    of = terms(4, 3)
    full = stage(of, *everybody(4, 4)).cohort
    cohorts = [stage(of, *everybody(4, k)).cohort for k in range(5)]
    id = "d-03"
    calls: dict[str, Callable[[Cohort], Cohort]] = {
        "adverts": lambda cohort: advertise(cohort, full.adverts[id]),
        "shares": lambda cohort: take_shares(cohort, full.shares[id]),
        "uploads": lambda cohort: take_masked(cohort, Masked("one", id), "blob"),
        "reveals": lambda cohort: take_reveal(cohort, full.reveals[id]),
    }

    def without(cohort: Cohort, answers: str) -> Cohort:
        left: Any = {device: said for device, said in getattr(cohort, answers).items() if device != id}
        return replace(cohort, **{answers: left})

    for number, (name, call) in enumerate(calls.items()):
        for reached, cohort in enumerate(cohorts):
            waiting = without(cohort, name)
            if reached == number:
                assert call(waiting) != waiting
            else:
                code = "too-early" if reached < number else "too-late"
                assert refusal(call, waiting) == code
            if 0 < number <= reached:
                gone = without(waiting, [*calls][number - 1])
                assert refusal(call, gone) == "not-in-cohort"


def test_nothing_is_told_too_early() -> None:
    """A roster is fixed when all keys are there, a delivery when all shares are, and the survivors when all vectors are."""
    told: list[Callable[[Cohort], object]] = [
        roster,
        lambda cohort: delivery(cohort, "d-00"),
        survivors,
        lambda cohort: unmask(cohort, []),
    ]
    for number, tell in enumerate(told, 1):
        assert refusal(tell, stage(terms(4, 3), *everybody(4, number - 1)).cohort) == "too-early"
    three = frozenset(ids(4)[1:])

    assert refusal(delivery, stage(terms(4, 3), three | {"d-00"}, three).cohort, "d-00") == "not-in-cohort"


def test_keys_are_looked_at_when_they_arrive() -> None:
    """One more device than there may be, a key twice, a key of an earlier cohort, a key that is no canonical point."""
    of = terms(4, 3)
    cohort = Cohort(of, deadline=10.0)
    adverts = {id: join(of, id, hashlib.sha256(id.encode()).digest())[1] for id in ids(5)}
    first, second = adverts["d-00"], adverts["d-01"]
    one = advertise(cohort, first)
    edit = msgspec.structs.replace

    assert refusal(advertise, one, edit(second, mask_key=first.mask_key)) == "bad-keys"
    assert refusal(advertise, one, edit(second, cipher_key=second.mask_key)) == "bad-keys"
    assert refusal(advertise, one, edit(second, mask_key=b"\xff" * 32)) == "bad-keys"
    assert refusal(advertise, one, second, {second.mask_key}) == "bad-keys"
    assert refusal(advertise, one, edit(second, cohort="two")) == "wrong-cohort"
    for id in ids(4)[1:]:
        one = advertise(one, adverts[id])
    assert refusal(advertise, one, adverts["d-04"]) == "cohort-full"


def test_two_cohorts_do_not_mix() -> None:
    """A message with the id of another cohort is refused, and one whose id was changed opens for nobody."""
    one, two = (stage(terms(4, 3, name), *everybody(4, 4)) for name in ("one", "two"))
    shared = stage(terms(4, 3), *everybody(4, 1)).cohort

    assert refusal(take_shares, shared, two.cohort.shares["d-01"]) == "wrong-cohort"
    assert refusal(take_masked, one.cohort, Masked("two", "d-01"), "blob") == "wrong-cohort"
    assert refusal(take_reveal, one.cohort, two.cohort.reveals["d-01"]) == "wrong-cohort"
    forged = msgspec.structs.replace(two.cohort.shares["d-01"], cohort="one")
    for id in ("d-00", "d-02", "d-03", "d-01"):
        shared = take_shares(shared, forged if id == "d-01" else one.cohort.shares[id])
    mixed = current(advance(shared, 0.0, 10.0))
    before = stage(terms(4, 3), *everybody(4, 2)).members
    assert refusal(receive, before["d-00"], delivery(mixed, "d-00")) == "bad-shares"
    swapped = [two.vectors["d-00"], *(one.vectors[id] for id in ids(4)[1:])]
    assert refusal(unmask, one.cohort, swapped) == "bad-sum"


def test_shares_and_reveals_for_the_wrong_devices_are_refused() -> None:
    """One too few, one too many, one of the other kind, or a number beyond the field."""
    sharing = replace(stage(terms(5, 4), *everybody(5, 1)).cohort)
    right = DONE.cohort.shares["d-00"]
    edit = msgspec.structs.replace
    box = right.sealed["d-01"]
    for sealed in ({"d-01": box}, {**right.sealed, "d-09": box}, {**right.sealed, "d-00": box}):
        assert refusal(take_shares, sharing, edit(right, sealed=sealed)) == "bad-list"

    unmasking = stage(terms(5, 4), *UPLOADED).cohort
    said = DONE.cohort.reveals["d-00"]
    fewer = {id: seed for id, seed in said.seeds.items() if id != "d-01"}
    for wrong in (
        edit(said, keys={}),
        edit(said, seeds={**said.seeds, "d-04": bytes(SHARE)}),  # both kinds for one
        edit(said, seeds=fewer),
        edit(said, seeds=fewer, keys={**said.keys, "d-01": bytes(SHARE)}),
        edit(said, keys={**said.keys, "d-01": bytes(SHARE)}),
    ):
        assert refusal(take_reveal, unmasking, wrong) == "bad-list"
    for number, fine in ((PRIME - 1, True), (PRIME, False)):
        said_so = edit(said, keys={"d-04": number.to_bytes(SHARE)})
        if fine:
            take_reveal(unmasking, said_so)
        else:
            assert refusal(take_reveal, unmasking, said_so) == "bad-shares"


# The sum -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "device", "code"), [("keys", "d-04", "bad-shares"), ("seeds", "d-02", "bad-sum")])
def test_a_false_share_is_noticed(kind: str, device: str, code: str) -> None:
    """A false key is none that was advertised; a false seed leaves a mask on, which the sum of weights shows."""
    cohort = DONE.cohort
    said = cohort.reveals["d-01"]
    share = (int.from_bytes(getattr(said, kind)[device]) ^ 1).to_bytes(SHARE)
    false = msgspec.structs.replace(said, **{kind: {**getattr(said, kind), device: share}})
    lied = replace(cohort, reveals={**cohort.reveals, "d-01": false})

    assert refusal(unmask, lied, DONE.vectors.values()) == code


@pytest.mark.parametrize(("kind", "device"), [("keys", "d-04"), ("seeds", "d-02")])
def test_shares_that_make_no_secret_are_refused(kind: str, device: str) -> None:
    """A false share can be chosen so that the number recovered is beyond 32 bytes; that is refused as well."""
    cohort = DONE.cohort
    points = {id: x for x, id in enumerate(ids(5), 1) if id != "d-04"}
    factors = lagrange(points.values())
    shares = {x: int.from_bytes(getattr(cohort.reveals[id], kind)[device]) for id, x in points.items()}
    change = (2**256 - recover(shares, factors)) * pow(factors[2], -1, PRIME)
    share = ((shares[2] + change) % PRIME).to_bytes(SHARE)
    false = msgspec.structs.replace(cohort.reveals["d-01"], **{kind: {**getattr(cohort.reveals["d-01"], kind), device: share}})
    lied = replace(cohort, reveals={**cohort.reveals, "d-01": false})

    assert refusal(unmask, lied, DONE.vectors.values()) == "bad-shares"


def test_vectors_that_do_not_fit_are_refused() -> None:
    """One missing, one twice, another length, another type; no vector of the cohort is changed by the sum."""
    vectors = list(DONE.vectors.values())
    copies = [vector.copy() for vector in vectors]

    assert refusal(unmask, DONE.cohort, vectors[:-1]) == "wrong-shape"
    assert refusal(unmask, DONE.cohort, [*vectors, vectors[0]]) == "wrong-shape"
    assert refusal(unmask, DONE.cohort, [*vectors[:-1], vectors[0]]) == "bad-sum"
    assert refusal(unmask, DONE.cohort, [*vectors[:-1], vectors[0][:-1]]) == "wrong-shape"
    assert refusal(unmask, DONE.cohort, [*vectors[:-1], vectors[0].astype(np.float32)]) == "wrong-shape"
    unmask(DONE.cohort, vectors)
    assert all((vector == copy).all() for vector, copy in zip(vectors, copies, strict=True))
