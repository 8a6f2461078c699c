"""Secure averaging in a run: what a cohort's terms are, and what a device of it does next; pure. `unmasking.py` is the protocol.

A device first trains and keeps what it learned. Then a cohort is formed of those that have, and in its four short phases the
server gets their mean. A cohort that fails before anybody was asked to reveal anything is followed by another, and nobody trains
again. One that fails later, since too many dropped out or somebody lied, takes its version with it: the next one is the same, and
all train on that.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from edge_sdk.adapters import AdapterSpec, Array
from edge_sdk.cohort import Join, Mask, Request, SealShares, Terms, Unmask
from edge_sdk.errors import SettingsError
from edge_sdk.masking import Floats
from edge_server import unmasking
from edge_server.unmasking import Cohort, State


class Secure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings.

    Args:
        threshold: devices without which no mean comes out; more than two thirds of a cohort, which has as many as a buffer.
        clip: largest absolute value in an update; what is beyond is cut.
        max_weight: an update counts for at most this many examples, or for `max_examples` where that is less.
        join_seconds: how long a cohort waits for devices once one has trained. phase_seconds: for each of its later phases.
    """

    threshold: int = 3
    clip: float = 1.0
    max_weight: int = 64
    join_seconds: float = 600.0
    phase_seconds: float = 120.0

    def __post_init__(self) -> None:
        if not 0 < self.join_seconds < math.inf or not 0 < self.phase_seconds < math.inf:
            raise SettingsError("secure.join_seconds and secure.phase_seconds must be positive and finite")


def terms(settings: Secure, size: int, spec: AdapterSpec, name: str, max_examples: int) -> Terms:
    """Raises: SettingsError: threshold, clip and largest weight do not go together."""
    return Terms(name, size, settings.threshold, length(spec), settings.clip, min(settings.max_weight, max_examples))


def length(spec: AdapterSpec) -> int:
    """Numbers in an update."""
    return sum(math.prod(shape) for shape in spec.update_shapes().values())


def plan(state: State, version: int, device: str) -> Request | None:
    """What a device that has trained on `version` should do now; None while others are awaited."""
    if not isinstance(state, Cohort):
        return None
    match state.phase:
        case "advertise" if device not in state.adverts and len(state.adverts) < state.terms.size:
            return Join(version, state.terms)
        case "share" if device in state.adverts and device not in state.shares:
            return SealShares(version, unmasking.roster(state))
        case "upload" if device in state.shares and device not in state.uploads:
            return Mask(version, unmasking.delivery(state, device))
        case "unmask" if device in state.uploads and device not in state.reveals:
            return Unmask(version, unmasking.survivors(state))
    return None


def unflatten(vector: Floats, spec: AdapterSpec) -> dict[str, Array]:
    """A vector as the arrays of an update, which lie in it in the order of their names."""
    shapes, arrays, at = spec.update_shapes(), {}, 0
    for name in sorted(shapes):
        size = math.prod(shapes[name])
        arrays[name] = np.array(vector[at : at + size].reshape(shapes[name]), np.float32)
        at += size
    return arrays
