"""Secure averaging, the device's side: the server learns a weighted mean and no single update; pure.

Double masking as in Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", section 4. A
device uploads its weighted vector plus masks: one it shares with each peer, which cancel in the sum, and one of its own, which
the peers help to take off. What would take off the mask of one device is spread over all as Shamir shares.

The server is taken to be semi-honest. Beyond that a device refuses what a lying server could ask of it (see `unmask_shares`), but
nobody vouches for keys, and devices do not compare their lists of peers and survivors. `cohort.Quorum` says why a server that
lies gets the vector of no single device all the same. It may get sums of fewer than the threshold, and single vectors where it
owns c of the devices and (threshold - 1 - c) (threshold - c) <= (size - c) (size - threshold): docs/systems/fedcollm.md.

Everything secret of a device in a cohort follows from 32 fresh bytes, so the same messages get the same answers, bit for bit.
Needs the package `cryptography`, so nothing else here may import this module at its top.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated

import msgspec
import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Meta
from msgspec.structs import replace
from numpy.typing import NDArray

from edge_sdk.cohort import (
    MAX_MEMBERS,
    SHARE,
    Advertise,
    Delivery,
    Id,
    Key,
    Reveal,
    Roster,
    Shares,
    Survivors,
    Terms,
)
from edge_sdk.errors import DataError, WireError

Ring = NDArray[np.uint32]  # elements of Z / 2^32
Floats = NDArray[np.float32]

PRIME = 2**256 + 297  # the smallest above every secret
CURVE = 2**255 - 19
LOW_ORDER = {  # points with which every private key makes the same secret, zero
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    CURVE - 1,
}
BLOCK = 1 << 16  # elements of a mask that are made at a time: what fits into a processor's cache
ZEROS = bytes(4 * BLOCK)
PURPOSE = b"tandem-edge masking 1"

Shared = Annotated[bytes, Meta(min_length=2 * SHARE, max_length=2 * SHARE)]


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device knows of its cohort; to be on disk before the answer that goes with it is sent, and deleted at the end.

    Args:
        secret: 32 fresh bytes that no other cohort has seen.
        inbox: the opened shares of everybody that shared, by device, its own included; a seed's and a key's after it.
        uploaded: sha256 of the masked vector. version: what it holds was learned from this one.
        answered: the list it revealed shares for.
    """

    terms: Terms
    device: Id
    secret: Key
    roster: Roster | None = None
    inbox: Annotated[dict[Id, Shared], Meta(max_length=MAX_MEMBERS)] = {}
    uploaded: str = ""
    version: int = -1
    answered: Survivors | None = None

    def __repr__(self) -> str:  # a log is no place for secrets
        return f"Member({self.device!r} of cohort {self.terms.cohort!r})"


# Fixed point ---------------------------------------------------------------------------------------------------------
def encode(values: Floats, weight: int, terms: Terms) -> Ring:
    """round(scale * weight * values), and after it the weight itself, (length + 1,), modulo 2^32.

    Values beyond ±clip are cut to it, a weight beyond `max_weight` counts as that.

    Raises:
        DataError: another length, NaN or infinity, or a weight below 1.
    """
    if values.shape != (terms.length,):
        raise DataError(f"this cohort averages vectors of {terms.length} elements, not of shape {values.shape}")
    if not np.isfinite(values).all():
        raise DataError("the vector holds NaN or infinity")
    if weight < 1:
        raise DataError("a device without examples has nothing to average")
    weight = min(weight, terms.max_weight)
    steps = np.rint(np.clip(values.astype(np.float64), -terms.clip, terms.clip) * (terms.scale * weight))
    return np.append(steps, weight).astype(np.int64).astype(np.uint32)


def decode(total: Ring, terms: Terms, count: int) -> tuple[Floats, int]:
    """The weighted mean and the sum of weights from the sum of `count` encoded vectors; `Terms.error` says how exact.

    Raises:
        WireError: `bad-sum`: no `count` encoded vectors have this sum of weights, or a mean beyond `clip`; a mask is still on it,
            or a vector was none that `encode` makes.
    """
    weight = int(total[-1])
    if not count <= weight <= count * terms.max_weight:
        raise WireError("bad-sum", "the masks do not cancel: a device sent a false share or vector", 422)
    mean = total[:-1].view(np.int32) / (terms.scale * float(weight))
    if np.abs(mean).max() > terms.clip + terms.error:
        raise WireError("bad-sum", f"the mean is beyond {terms.clip}, where each vector is cut: a device sent a false one", 422)
    return mean.astype(np.float32), weight


def pack(vector: Ring) -> bytes:
    """Little-endian, 4 bytes an element."""
    return vector.astype("<u4", copy=False).tobytes()


def unpack(body: bytes, terms: Terms) -> Ring:
    """Raises: WireError: `wrong-shape`: not 4 * (length + 1) bytes."""
    if len(body) != 4 * (terms.length + 1):
        raise WireError("wrong-shape", f"a masked vector of this cohort has {4 * (terms.length + 1)} bytes, not {len(body)}", 422)
    return np.frombuffer(body, "<u4").astype(np.uint32, copy=False)


def add_mask(total: Ring, key: bytes, sign: int) -> None:
    """Adds sign * PRG(key) to `total` where it lies; `sign` is 1 or -1.

    PRG is AES-256-CTR from counter 0; a key makes one mask only. 460,801 elements take 0.25 ms, ChaCha20 0.37 ms, on a processor
    with AES instructions. One without them, such as a Raspberry Pi 4's, would be faster with ChaCha20.
    """
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    for start in range(0, len(total), BLOCK):
        part = total[start : start + BLOCK]
        mask = np.frombuffer(stream.update(ZEROS[: 4 * len(part)]), "<u4")
        if sign > 0:
            part += mask
        else:
            part -= mask


# Keys ----------------------------------------------------------------------------------------------------------------
def binding(roster: Roster) -> bytes:
    """The cohort and a digest of all that its members must agree on; part of every derived key."""
    return roster.terms.cohort.encode() + b"\0" + hashlib.sha256(msgspec.json.encode(roster)).digest()


def self_key(seed: bytes, bound: bytes, device: str) -> bytes:
    """Of a device's own mask."""
    return _derive(seed, _info(b"self mask", bound, device))


def pair_key(private: bytes, public: bytes, bound: bytes, device: str, peer: str) -> bytes:
    """Of the mask that two devices share; either one's private and the other's public key make it.

    Raises:
        WireError: `bad-keys`: a public key of low order, with which everybody knows the secret.
    """
    return _agree(private, public, b"pair mask", bound, device, peer)


def public_key(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def check_keys(members: Sequence[Advertise], used: Collection[bytes] = ()) -> None:
    """Raises: WireError: `bad-keys`: a key is there twice, was in another cohort, is of low order or not canonical."""
    keys = [key for member in members for key in (member.cipher_key, member.mask_key)]
    if len(set(keys)) < len(keys):
        raise WireError("bad-keys", "two keys of this cohort are the same; make new ones", 422)
    points = {int.from_bytes(key, "little") for key in keys}
    if max(points, default=0) >= CURVE or points & LOW_ORDER:
        raise WireError("bad-keys", "a key is of low order, or not the canonical form of a point", 422)
    if not set(keys).isdisjoint(used):
        raise WireError("bad-keys", "a key was used in another cohort already; make new ones", 422)


def _agree(private: bytes, public: bytes, label: bytes, bound: bytes, device: str, peer: str) -> bytes:
    try:
        secret = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # the shared secret is zero
        raise WireError("bad-keys", f"{peer} and {device} agree on nothing: a key is of low order", 422) from error
    return _derive(secret, _info(label, bound, *sorted((device, peer))))


def _derive(secret: bytes, info: bytes, length: int = 32) -> bytes:
    return HKDF(SHA256(), length, None, info).derive(secret)


def _info(label: bytes, bound: bytes, *devices: str) -> bytes:
    """Ids hold no zero byte, so no two lists look alike."""
    return b"\0".join([PURPOSE, label, bound, *(device.encode() for device in devices)])


# Shares --------------------------------------------------------------------------------------------------------------
def split(secret: int, coefficients: Sequence[int], count: int, prime: int = PRIME) -> list[int]:
    """Shamir's shares at 1 to `count`: values of secret + c_1 x + c_2 x^2 + ...; one more than there are c recover it."""
    shares = []
    for x in range(1, count + 1):
        value = 0
        for coefficient in (*reversed(coefficients), secret):
            value = (value * x + coefficient) % prime
        shares.append(value)
    return shares


def lagrange(points: Collection[int], prime: int = PRIME) -> dict[int, int]:
    """What to multiply the shares at these points with, so that they sum to the secret."""
    found = {}
    for x in points:
        over = math.prod(other for other in points if other != x)
        under = math.prod(other - x for other in points if other != x)
        found[x] = over * pow(under, -1, prime) % prime
    return found


def recover(shares: Mapping[int, int], factors: Mapping[int, int], prime: int = PRIME) -> int:
    """The secret, from at least as many shares as the threshold; `factors` are the `lagrange` of their points."""
    return sum(factor * shares[x] for x, factor in factors.items()) % prime


# The four answers of a device ----------------------------------------------------------------------------------------
def join(terms: Terms, device: str, secret: bytes) -> tuple[Member, Advertise]:
    """Keys for a cohort.

    Args:
        secret: 32 fresh bytes of the system's randomness.

    Raises:
        DataError: not 32 bytes.
    """
    if len(secret) != 32:
        raise DataError(f"a cohort needs 32 secret bytes, not {len(secret)}")
    member = Member(terms, device, secret)
    return member, Advertise(terms.cohort, device, public_key(_own(member, b"cipher key")), public_key(_own(member, b"mask key")))


def share(member: Member, roster: Roster) -> tuple[Member, Shares]:
    """Spreads what would take off this device's masks over the cohort.

    Raises:
        WireError: `wrong-cohort`, `bad-keys`, `bad-list` (no order, a device twice, itself missing), `too-few`, or
            `already-answered` (with another roster).
    """
    if member.roster is None:
        _check_roster(member, roster)
    elif member.roster != roster:
        raise WireError("already-answered", "this device has shared with another roster of this cohort", 409)
    bound = binding(roster)
    private = _own(member, b"cipher key")
    payloads = _payloads(member, roster)
    sealed = {}
    for peer in roster.members:
        if peer.device != member.device:
            key = _agree(private, peer.cipher_key, b"seal", bound, member.device, peer.device)
            nonce, data = _envelope(bound, member.device, peer.device)
            sealed[peer.device] = ChaCha20Poly1305(key).encrypt(nonce, payloads[peer.device], data)
    return replace(member, roster=roster), Shares(roster.terms.cohort, member.device, sealed)


def receive(member: Member, delivery: Delivery) -> Member:
    """Opens the shares of those peers that sent some; the others are out of the cohort.

    Raises:
        WireError: `wrong-cohort`, `too-early`, `bad-list` (a device that is not on the roster), `too-few`, `bad-shares` (damaged,
            or sealed for somebody else or in another cohort), or `already-answered` (with other shares).
    """
    roster = _on_roster(member, delivery.cohort)
    if delivery.device != member.device or not delivery.sealed.keys() <= set(roster.ids) - {member.device}:
        raise WireError("bad-list", "the shares are not of the peers on the roster, for this device", 422)
    _check_count(member.terms, len(delivery.sealed) + 1, "sent shares")
    bound = binding(roster)
    private = _own(member, b"cipher key")
    inbox = {}
    for peer in roster.members:
        if peer.device == member.device:
            inbox[peer.device] = _payloads(member, roster)[peer.device]
        elif peer.device in delivery.sealed:
            key = _agree(private, peer.cipher_key, b"seal", bound, member.device, peer.device)
            nonce, data = _envelope(bound, peer.device, member.device)
            try:
                inbox[peer.device] = ChaCha20Poly1305(key).decrypt(nonce, delivery.sealed[peer.device], data)
            except InvalidTag as error:
                raise WireError("bad-shares", f"what {peer.device} sealed cannot be opened here", 422) from error
            if len(inbox[peer.device]) != 2 * SHARE or max(_numbers(inbox[peer.device])) >= PRIME:
                raise WireError("bad-shares", f"what {peer.device} sealed is not two shares", 422)
    if member.inbox and member.inbox != inbox:
        raise WireError("already-answered", "this device has already taken other shares in this cohort", 409)
    return replace(member, inbox=inbox)


def masked(member: Member, values: Floats, weight: int) -> tuple[Member, Ring]:
    """y_u = encode(x_u, w_u) + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv) over the peers whose shares arrived.

    Raises:
        DataError: what `encode` refuses.
        WireError: `too-early`, or `already-answered`: it has masked another vector, and the two would tell their difference.
    """
    roster = _on_roster(member, member.terms.cohort)
    if not member.inbox:
        raise WireError("too-early", "no shares have arrived in this cohort yet", 409)
    bound = binding(roster)
    private = _own(member, b"mask key")
    vector = encode(values, weight, member.terms)
    add_mask(vector, self_key(_own(member, b"seed"), bound, member.device), 1)
    for peer in roster.members:
        if peer.device in member.inbox and peer.device != member.device:
            add_mask(
                vector,
                pair_key(private, peer.mask_key, bound, member.device, peer.device),
                1 if member.device < peer.device else -1,
            )
    digest = hashlib.sha256(pack(vector)).hexdigest()
    if member.uploaded not in ("", digest):
        raise WireError("already-answered", "this device has already masked another vector in this cohort", 409)
    return replace(member, uploaded=digest), vector


def unmask_shares(member: Member, survivors: Survivors) -> tuple[Member, Reveal]:
    """A share of the seed of everybody that survived, and of the mask key of everybody that dropped out.

    Both kinds for one device would lay its vector open, so it answers one list only, and that once.

    Raises:
        WireError: `wrong-cohort`, `too-early` (it has masked nothing), `bad-list` (a device twice, on both lists, on neither or
            unknown; or this device itself dropped), `too-few` survived, or `already-answered` (another list).
    """
    _on_roster(member, survivors.cohort)
    if not member.uploaded:
        raise WireError("too-early", "this device has masked nothing in this cohort yet", 409)
    named = (*survivors.survived, *survivors.dropped)
    if len(set(named)) < len(named) or set(named) != member.inbox.keys():
        raise WireError("bad-list", "each device that shared keys must be named once, as survived or as dropped", 422)
    if member.device in survivors.dropped:
        raise WireError("bad-list", "this device is named dropped; its masks stay on", 422)
    _check_count(member.terms, len(survivors.survived), "survived")
    if member.answered is not None and set(member.answered.survived) != set(survivors.survived):
        raise WireError("already-answered", "this device has already revealed shares for another list", 409)
    seeds = {device: member.inbox[device][:SHARE] for device in sorted(survivors.survived)}
    keys = {device: member.inbox[device][SHARE:] for device in sorted(survivors.dropped)}
    return replace(member, answered=survivors), Reveal(survivors.cohort, member.device, seeds, keys)


def _own(member: Member, label: bytes, bound: bytes = b"", length: int = 32) -> bytes:
    """Something secret of this device in this cohort."""
    return _derive(member.secret, _info(label, bound or member.terms.cohort.encode(), member.device), length)


def _payloads(member: Member, roster: Roster) -> dict[str, bytes]:
    """A share of the seed and one of the mask key for everybody on the roster, itself included."""
    parts = []
    for label in (b"seed", b"mask key"):
        count = roster.terms.threshold - 1
        noise = _own(member, label + b" shares", binding(roster), 48 * count)  # 384 bits each: as good as even modulo PRIME
        coefficients = [int.from_bytes(noise[48 * i : 48 * i + 48]) % PRIME for i in range(count)]
        parts.append(split(int.from_bytes(_own(member, label)), coefficients, len(roster.members)))
    return {id: seed.to_bytes(SHARE) + key.to_bytes(SHARE) for id, seed, key in zip(roster.ids, *parts, strict=True)}


def _numbers(shares: bytes) -> tuple[int, int]:
    return int.from_bytes(shares[:SHARE]), int.from_bytes(shares[SHARE:])


def _envelope(bound: bytes, sender: str, receiver: str) -> tuple[bytes, bytes]:
    """Nonce and associated data; a pair has one key, under which each of the two seals once."""
    return bytes(11) + bytes([sender < receiver]), _info(b"seal", bound, sender, receiver)


def _check_roster(member: Member, roster: Roster) -> None:
    if roster.terms != member.terms or any(other.cohort != member.terms.cohort for other in roster.members):
        raise WireError("wrong-cohort", "this roster is of another cohort, or on other terms", 409)
    if roster.ids != sorted(set(roster.ids)) or len(roster.ids) > roster.terms.size:
        raise WireError("bad-list", "a roster names each device once, in order, and not more than the cohort may have", 422)
    own = join(member.terms, member.device, member.secret)[1]
    if own not in roster.members:
        raise WireError("bad-list", "this device is not on the roster with the keys it sent", 422)
    _check_count(roster.terms, len(roster.members), "sent keys")
    check_keys(roster.members)


def _on_roster(member: Member, cohort: str) -> Roster:
    if cohort != member.terms.cohort:
        raise WireError("wrong-cohort", f"this device is in cohort {member.terms.cohort}, not in this one", 409)
    if member.roster is None:
        raise WireError("too-early", "this device knows no roster yet", 409)
    return member.roster


def _check_count(terms: Terms, count: int, what: str) -> None:
    if count < terms.threshold:
        raise WireError("too-few", f"{count} devices {what}, this cohort needs {terms.threshold}", 409)
