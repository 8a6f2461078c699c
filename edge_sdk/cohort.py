"""What a server and the devices of a cohort tell each other in secure averaging, as frozen values; no cryptography here.

`masking.py` computes what devices say, `edge_server/unmasking.py` what the server makes of it. Bytes are base64 in JSON.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_sdk.errors import SettingsError

MAX_MEMBERS = 128
MAX_LENGTH = 1 << 26
MAX_ERROR = 1e-4  # of a decoded mean
SHARE = 33  # bytes of a number below the prime
SEALED = 2 * SHARE + 16  # two shares and Poly1305's tag

Id = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9-]{1,64}\Z")]
Ids = Annotated[tuple[Id, ...], Meta(max_length=MAX_MEMBERS)]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Share = Annotated[bytes, Meta(min_length=SHARE, max_length=SHARE)]
Sealed = Annotated[bytes, Meta(min_length=SEALED, max_length=SEALED)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of these messages; carries no behaviour."""


class Quorum(Message, frozen=True):
    """How many devices a cohort of a run has.

    A device tells, for each peer, a share of its seed or of its mask key, as the server says that it survived or dropped out. A
    lying server that owns no device and tells different devices different lists, to lay open the vector of one of them, A, needs

    - threshold shares of A's seed; as many of A's mask key are then out of reach, since 2 threshold > size;
    - so those of the mask keys of A's peers, which are at least threshold - 1: (threshold - 1) threshold shares. Each device says
      of at most size - threshold others that they dropped, so no more than size (size - threshold) are told.

    With 3 threshold > 2 size the first is the larger.

    Args:
        size: devices at most.
        threshold: devices without which nothing comes out; more than two thirds of `size`.
    """

    size: int
    threshold: int

    def __post_init__(self) -> None:
        if not 2 <= self.size <= MAX_MEMBERS or not 2 * self.size < 3 * self.threshold <= 3 * self.size:
            raise SettingsError(f"a cohort has 2 to {MAX_MEMBERS} devices, and a threshold of more than two thirds of them")


class Terms(Message, frozen=True):
    """Server -> device: what a cohort is.

    Args:
        cohort: its id, never used again.
        size, threshold: as in `Quorum`.
        length: of a device's vector.
        clip: largest absolute value of an element; what is beyond is cut.
        max_weight: largest weight of a device.
    """

    cohort: Id
    size: int
    threshold: int
    length: int
    clip: float
    max_weight: int

    def __post_init__(self) -> None:
        _ = self.quorum
        if not 1 <= self.length <= MAX_LENGTH or self.max_weight < 1 or not 1e-6 <= self.clip < math.inf:
            raise SettingsError(
                f"a cohort's length must be 1 to {MAX_LENGTH}, max_weight at least 1, clip finite and at least 1e-6"
            )
        if not self.scale or self.error > MAX_ERROR:
            raise SettingsError(
                f"size * max_weight * clip leaves 32 bits too coarse for an error of {MAX_ERROR}; lower max_weight or clip"
            )

    @property
    def quorum(self) -> Quorum:
        """Raises: SettingsError: there is none of this size and threshold."""
        return Quorum(self.size, self.threshold)

    @property
    def scale(self) -> int:
        """Steps in a weighted unit: floor(floor((2^31 - 1) / size) / (max_weight * clip)), so that no sum overflows."""
        return int((2**31 - 1) // self.size / (self.max_weight * self.clip))

    @property
    def error(self) -> float:
        """How far an element of the mean may be off: 1 / (2 scale) + clip * 2^-24.

        Each of m devices rounds w x scale by at most 1/2, which makes m / (2 scale sum(w)), and no weight is below 1. The mean
        itself is rounded to float32. At size 32, max_weight 64 and clip 4 this is 2.2e-6.
        """
        return 0.5 / self.scale + self.clip * 2.0**-24


class Advertise(Message, frozen=True, tag="advertise", tag_field="result"):
    """Device -> server: its public keys for this cohort, one that seals shares and one that makes masks."""

    cohort: Id
    device: Id
    cipher_key: Key
    mask_key: Key


class Roster(Message, frozen=True):
    """Server -> device: everybody's keys, in the order of their ids; devices that were sent different ones cannot share."""

    terms: Terms
    members: Annotated[tuple[Advertise, ...], Meta(max_length=MAX_MEMBERS)]

    @property
    def ids(self) -> list[str]:
        return [member.device for member in self.members]


class Shares(Message, frozen=True, tag="shares", tag_field="result"):
    """Device -> server: for each other device of the roster a share of its own seed and of its mask key, sealed."""

    cohort: Id
    device: Id
    sealed: Annotated[dict[Id, Sealed], Meta(max_length=MAX_MEMBERS)]


class Delivery(Message, frozen=True):
    """Server -> device: what each peer that sent shares has sealed for `device`."""

    cohort: Id
    device: Id
    sealed: Annotated[dict[Id, Sealed], Meta(max_length=MAX_MEMBERS)]


class Masked(Message, frozen=True, tag="masked", tag_field="result"):
    """Device -> server, beside the 4 * (length + 1) bytes of its masked vector."""

    cohort: Id
    device: Id


class Survivors(Message, frozen=True):
    """Server -> device: whose vectors are in the sum, and who shared keys but sent none."""

    cohort: Id
    survived: Ids
    dropped: Ids


class Reveal(Message, frozen=True, tag="reveal", tag_field="result"):
    """Device -> server: shares of the seeds of those that survived, and of the mask keys of those that dropped out."""

    cohort: Id
    device: Id
    seeds: Annotated[dict[Id, Share], Meta(max_length=MAX_MEMBERS)]
    keys: Annotated[dict[Id, Share], Meta(max_length=MAX_MEMBERS)]


Answer = Advertise | Shares | Masked | Reveal


# What a device is asked to do -----------------------------------------------------------------------------------------
class Join(Message, frozen=True, tag="join", tag_field="verb"):
    """Make keys for this cohort, and send an `Advertise`: the device has learned from version `version` and keeps it so far."""

    version: int
    terms: Terms


class SealShares(Message, frozen=True, tag="seal-shares", tag_field="verb"):
    """Send `Shares` for everybody on the roster."""

    version: int
    roster: Roster


class Mask(Message, frozen=True, tag="mask", tag_field="verb"):
    """Open the peers' shares, and send what was learned, masked."""

    version: int
    delivery: Delivery


class Unmask(Message, frozen=True, tag="unmask", tag_field="verb"):
    """Send a `Reveal`, which takes the masks off the sum."""

    version: int
    survivors: Survivors


Request = Join | SealShares | Mask | Unmask
