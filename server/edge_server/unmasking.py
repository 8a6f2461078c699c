"""Secure averaging, the server's side: a cohort goes through four phases, and its sum comes out; pure.

Each phase takes one answer from each device of the phase before: keys, sealed shares, a masked vector, revealed shares. The
server calls `advance` after every answer and when the deadline is over: who has not answered by then has dropped out, and with
fewer than the threshold left the cohort has failed. Before the last phase the same trainings may then go into another; from there
on they may not, since of two sums, with and without a device, the difference is what it learned. A new state must be on disk
before anybody hears of it: two different lists of survivors for one cohort, after a crash, end it.

`edge_sdk/masking.py` says what is computed and why.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Literal, TypeVar

import msgspec
import numpy as np
from msgspec.structs import replace

from edge_sdk.cohort import Advertise, Delivery, Masked, Reveal, Roster, Shares, Survivors, Terms
from edge_sdk.errors import WireError
from edge_sdk.masking import (
    PRIME,
    Floats,
    Ring,
    add_mask,
    binding,
    check_keys,
    decode,
    lagrange,
    pair_key,
    public_key,
    recover,
    self_key,
)

Phase = Literal["advertise", "share", "upload", "unmask", "done"]
PHASES: tuple[Phase, ...] = ("advertise", "share", "upload", "unmask", "done")

T = TypeVar("T")


def _nobody() -> Mapping[str, T]:
    return MappingProxyType({})


class Cohort(msgspec.Struct, frozen=True, tag="cohort"):
    """A cohort on its way; answers by device.

    Args:
        deadline: when the phase ends at the latest.
        uploads: the masked vectors, as the names of their blobs.
    """

    terms: Terms
    deadline: float
    phase: Phase = "advertise"
    adverts: Mapping[str, Advertise] = msgspec.field(default_factory=_nobody)
    shares: Mapping[str, Shares] = msgspec.field(default_factory=_nobody)
    uploads: Mapping[str, str] = msgspec.field(default_factory=_nobody)
    reveals: Mapping[str, Reveal] = msgspec.field(default_factory=_nobody)


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A cohort nothing can come of any more.

    Args:
        revealed: its devices may have revealed shares, so what they learned is for no other cohort.
    """

    cohort: str
    reason: str
    revealed: bool = False


State = Cohort | Failed


def current(state: State) -> Cohort:
    """Raises: WireError: `cohort-failed`."""
    if isinstance(state, Failed):
        raise WireError("cohort-failed", f"{state.reason}; ask for work", 409)
    return state


def advance(state: State, now: float, seconds: float) -> State:
    """The next phase, `seconds` long, where everybody has answered or time is up; else the same state.

    Shares of as many devices as the threshold take the masks off, so the last phase waits for no more.
    """
    if isinstance(state, Failed) or state.phase == "done":
        return state
    answered, asked = len(_answers(state, state.phase)), len(_answers(state, _before(state.phase)))
    wanted = {"advertise": state.terms.size, "unmask": state.terms.threshold}.get(state.phase, asked)
    if answered < wanted and now < state.deadline:
        return state
    if answered < state.terms.threshold:
        return Failed(
            state.terms.cohort,
            f"only {answered} devices answered in the phase `{state.phase}`, this cohort needs {state.terms.threshold}",
            revealed=state.phase == "unmask",
        )
    return replace(state, phase=PHASES[PHASES.index(state.phase) + 1], deadline=now + seconds)


# What devices send ---------------------------------------------------------------------------------------------------
def advertise(cohort: Cohort, message: Advertise, used: Collection[bytes] = ()) -> Cohort:
    """Takes in a device's keys.

    Args:
        used: public keys of earlier cohorts.

    Raises:
        WireError: `wrong-cohort`, `already-answered`, `too-late`, `bad-keys`, or `cohort-full`.
    """
    if not _is_new(cohort, "advertise", message.cohort, message.device, message):
        return cohort
    if len(cohort.adverts) >= cohort.terms.size:
        raise WireError("cohort-full", "this cohort has all its devices; ask for work", 409)
    check_keys([*cohort.adverts.values(), message], used)
    return replace(cohort, adverts=_with(cohort.adverts, message.device, message))


def take_shares(cohort: Cohort, message: Shares) -> Cohort:
    """Takes in what a device sealed.

    Raises:
        WireError: `wrong-cohort`, `not-in-cohort`, `already-answered`, `too-early`, `too-late`, or `bad-list`: not for each other
            device of the roster.
    """
    if not _is_new(cohort, "share", message.cohort, message.device, message):
        return cohort
    if message.sealed.keys() != cohort.adverts.keys() - {message.device}:
        raise WireError("bad-list", "there must be shares for each other device on the roster, and for nobody else", 422)
    return replace(cohort, shares=_with(cohort.shares, message.device, message))


def take_masked(cohort: Cohort, message: Masked, blob: str) -> Cohort:
    """Takes in a device's masked vector.

    Args:
        blob: its name, which must follow from its bytes.

    Raises:
        WireError: `wrong-cohort`, `not-in-cohort`, `already-answered`, `too-early` or `too-late`.
    """
    if not _is_new(cohort, "upload", message.cohort, message.device, blob):
        return cohort
    return replace(cohort, uploads=_with(cohort.uploads, message.device, blob))


def take_reveal(cohort: Cohort, message: Reveal) -> Cohort:
    """Takes in the shares a device reveals.

    Raises:
        WireError: `wrong-cohort`, `not-in-cohort`, `already-answered`, `too-early`, `too-late`, `bad-list` (not for those, or
            not of the kind, that it was asked for), or `bad-shares` (no numbers of the field).
    """
    if not _is_new(cohort, "unmask", message.cohort, message.device, message):
        return cohort
    if message.seeds.keys() != cohort.uploads.keys() or message.keys.keys() != cohort.shares.keys() - cohort.uploads.keys():
        raise WireError("bad-list", "there must be a seed's share for each survivor and a key's for each dropped device", 422)
    if any(int.from_bytes(share) >= PRIME for share in (*message.seeds.values(), *message.keys.values())):
        raise WireError("bad-shares", "a share is too large a number", 422)
    return replace(cohort, reveals=_with(cohort.reveals, message.device, message))


# What devices are told -----------------------------------------------------------------------------------------------
def roster(cohort: Cohort) -> Roster:
    """Raises: WireError: `too-early`."""
    _check_reached(cohort, "share")
    return Roster(cohort.terms, tuple(cohort.adverts[device] for device in sorted(cohort.adverts)))


def delivery(cohort: Cohort, device: str) -> Delivery:
    """Raises: WireError: `too-early`, or `not-in-cohort`: it sent no shares itself."""
    _check_reached(cohort, "upload")
    if device not in cohort.shares:
        raise WireError("not-in-cohort", "this device sent no shares in time; ask for work", 403)
    sealed = {sender: cohort.shares[sender].sealed[device] for sender in sorted(cohort.shares) if sender != device}
    return Delivery(cohort.terms.cohort, device, sealed)


def survivors(cohort: Cohort) -> Survivors:
    """Raises: WireError: `too-early`."""
    _check_reached(cohort, "unmask")
    dropped = cohort.shares.keys() - cohort.uploads.keys()
    return Survivors(cohort.terms.cohort, tuple(sorted(cohort.uploads)), tuple(sorted(dropped)))


# The sum -------------------------------------------------------------------------------------------------------------
def unmask(cohort: Cohort, vectors: Iterable[Ring]) -> tuple[Floats, int]:
    """The weighted mean of the survivors' vectors and the sum of their weights.

    Args:
        vectors: the blobs of `uploads`, each once, in any order; one at a time is in memory.

    Raises:
        WireError: `too-early`, `wrong-shape`, `bad-shares` (they do not make the key that was advertised), or `bad-sum`: masks
            are left on, or the mean is beyond `clip`. Then nobody can tell who lied, and the cohort is lost.
    """
    _check_reached(cohort, "done")
    total = np.zeros(cohort.terms.length + 1, np.uint32)
    count = 0
    for vector in vectors:
        if vector.shape != total.shape or vector.dtype != total.dtype:
            raise WireError("wrong-shape", f"a masked vector of this cohort has {len(total)} elements of 32 bits", 422)
        total += vector
        count += 1
    if count != len(cohort.uploads):
        raise WireError("wrong-shape", f"the sum is of {len(cohort.uploads)} vectors, not of {count}", 422)
    told = roster(cohort)
    bound = binding(told)
    points = {device: x for x, device in enumerate(told.ids, 1)}
    speakers = {points[device]: cohort.reveals[device] for device in sorted(cohort.reveals)[: cohort.terms.threshold]}
    factors = lagrange(speakers)
    for device in cohort.uploads:
        seed = _secret({x: speaker.seeds[device] for x, speaker in speakers.items()}, factors)
        add_mask(total, self_key(seed, bound, device), -1)
    for device in cohort.shares.keys() - cohort.uploads.keys():
        private = _secret({x: speaker.keys[device] for x, speaker in speakers.items()}, factors)
        if public_key(private) != cohort.adverts[device].mask_key:
            raise WireError("bad-shares", f"the shares revealed for {device} do not make its key", 422)
        for peer in cohort.uploads:
            add_mask(
                total,
                pair_key(private, cohort.adverts[peer].mask_key, bound, device, peer),
                -1 if peer < device else 1,  # the sign the peer gave it, turned
            )
    return decode(total, cohort.terms, count)


def _secret(shares: Mapping[int, bytes], factors: Mapping[int, int]) -> bytes:
    found = recover({x: int.from_bytes(share) for x, share in shares.items()}, factors)
    if found >= 1 << 256:
        raise WireError("bad-shares", "the shares revealed make no secret", 422)
    return found.to_bytes(32)


def _before(phase: Phase) -> Phase:
    return PHASES[max(PHASES.index(phase) - 1, 0)]


def _answers(cohort: Cohort, phase: Phase) -> Mapping[str, object]:
    answers: dict[Phase, Mapping[str, object]] = {
        "advertise": cohort.adverts,
        "share": cohort.shares,
        "upload": cohort.uploads,
        "unmask": cohort.reveals,
    }
    return answers[phase]


def _is_new(cohort: Cohort, phase: Phase, id: str, device: str, answer: object) -> bool:
    """Whether this is an answer to take in; False where it is there already."""
    if id != cohort.terms.cohort:
        raise WireError("wrong-cohort", f"this is cohort {cohort.terms.cohort}; ask for work", 409)
    known = _answers(cohort, phase)
    if device in known:
        if known[device] != answer:
            raise WireError("already-answered", f"this device has already answered the phase `{phase}` otherwise", 409)
        return False
    _check_reached(cohort, phase)
    if phase != "advertise" and device not in _answers(cohort, _before(phase)):
        raise WireError("not-in-cohort", "this device is not, or no longer, in this cohort; ask for work", 403)
    if cohort.phase != phase:
        raise WireError("too-late", f"the phase `{phase}` of this cohort is over; ask for work", 409)
    return True


def _check_reached(cohort: Cohort, phase: Phase) -> None:
    if PHASES.index(cohort.phase) < PHASES.index(phase):
        raise WireError("too-early", f"this cohort is still in the phase `{cohort.phase}`; ask again", 409)


def _with(answers: Mapping[str, T], device: str, answer: T) -> Mapping[str, T]:
    return MappingProxyType({**answers, device: answer})
