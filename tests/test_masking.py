"""A device's side of secure averaging: fixed point, masks, shares and keys by hand, and everything it refuses."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_sdk import wire
from edge_sdk.cohort import MAX_MEMBERS, SEALED, SHARE, Advertise, Delivery, Masked, Reveal, Roster, Shares, Survivors, Terms
from edge_sdk.errors import DataError, SettingsError, WireError
from edge_sdk.masking import (
    BLOCK,
    CURVE,
    LOW_ORDER,
    PRIME,
    Member,
    Ring,
    add_mask,
    binding,
    check_keys,
    decode,
    encode,
    join,
    lagrange,
    masked,
    pack,
    pair_key,
    public_key,
    receive,
    recover,
    self_key,
    share,
    split,
    unmask_shares,
    unpack,
)
from tests import strategies

IDS = ("d-0", "d-1", "d-2", "d-3")
LARGE = Terms("large", size=32, threshold=22, length=6, clip=4.0, max_weight=64)
VALUES = np.array([0.5, -0.25, 0.0, 1.0, -1.0], np.float32)


def terms(cohort: str = "one") -> Terms:
    return Terms(cohort, size=4, threshold=3, length=5, clip=2.0, max_weight=16)


def secret(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


class Devices:
    """Devices of one cohort that have shared, and what they sent each other."""

    def __init__(self, of: Terms, ids: Iterable[str] = IDS, salt: str = "") -> None:
        joined = {id: join(of, id, secret(id + salt)) for id in ids}
        self.roster = Roster(of, tuple(advert for _, advert in joined.values()))
        shared = {id: share(member, self.roster) for id, (member, _) in joined.items()}
        self.joined = {id: member for id, (member, _) in joined.items()}
        self.members = {id: member for id, (member, _) in shared.items()}
        self.shares = {id: message for id, (_, message) in shared.items()}

    def delivery(self, device: str, senders: Iterable[str]) -> Delivery:
        sealed = {sender: self.shares[sender].sealed[device] for sender in senders if sender != device}
        return Delivery(self.roster.terms.cohort, device, sealed)

    def received(self, device: str, senders: Iterable[str] = IDS) -> Member:
        return receive(self.members[device], self.delivery(device, senders))


ONE = Devices(terms())
OTHER = Devices(terms("two"))  # the same devices and secrets


def mask(key: bytes, length: int) -> Ring:
    total = np.zeros(length, np.uint32)
    add_mask(total, key, 1)
    return total


def refusal(call: Callable[..., object], *arguments: object) -> str:
    """The code it refuses these with."""
    with pytest.raises(WireError) as caught:
        call(*arguments)
    return caught.value.code


# Fixed point ---------------------------------------------------------------------------------------------------------
def test_fixed_point_by_hand() -> None:
    """Half a unit at weight 2 is a scale, a cut value is the clip, and negative numbers are those below 2^32."""
    two = Terms("two", size=2, threshold=2, length=3, clip=1.0, max_weight=4)
    encoded = encode(np.array([0.5, -1.0, 3.0], np.float32), 2, two)

    assert two.scale == (2**30 - 1) // 4
    assert encoded.tolist() == [two.scale, 2**32 - 2 * two.scale, 2 * two.scale, 2]
    mean, weight = decode(encoded, two, 1)
    assert mean.tolist() == [0.5, -1.0, 1.0]
    assert weight == 2


@given(st.integers(0, 2**32 - 1), st.integers(1, 32), st.sampled_from([1, 64, 10_000]))
def test_the_mean_is_exact_to_its_bound(seed: int, count: int, heaviest: int) -> None:
    """32 devices, clip 4 and weights up to 64: within 2.2e-6 of the mean in float64; beyond clip and weight it is cut."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 3, (count, LARGE.length)).astype(np.float32)
    weights = rng.integers(1, heaviest + 1, count)
    total = np.zeros(LARGE.length + 1, np.uint32)
    for vector, weight in zip(values, weights, strict=True):
        total += encode(vector, int(weight), LARGE)
    mean, weight = decode(total, LARGE, count)

    counted = np.minimum(weights, 64)
    assert LARGE.error < 2.2e-6
    assert weight == counted.sum()
    assert np.abs(mean - np.average(np.clip(values.astype(np.float64), -4, 4), axis=0, weights=counted)).max() <= LARGE.error


@given(st.integers(2, MAX_MEMBERS), st.integers(1, 5000), st.floats(0.01, 1), st.sampled_from([-1, 1]))
def test_no_sum_overflows(size: int, heaviest: int, part: float, sign: int) -> None:
    """As many devices as there may be, all at the clip and at the largest weight: the mean is the clip, not its opposite."""
    clip = part * min(800.0, 2**31 / (size * heaviest * 10_200))
    tight = Terms("tight", size, size, 1, clip, heaviest)
    total = encode(np.array([sign * 2 * clip], np.float32), heaviest, tight) * np.uint32(size)
    mean, weight = decode(total, tight, size)

    assert weight == size * heaviest
    assert abs(float(mean[0]) - sign * clip) <= tight.error <= 1e-4  # in float64: clip need be no float32


def test_what_cannot_be_encoded_is_refused() -> None:
    """NaN, infinity, another length, and no examples."""
    for wrong in (np.nan, np.inf, -np.inf):
        with pytest.raises(DataError, match="NaN"):
            encode(np.array([0, 0, wrong, 0, 0], np.float32), 1, terms())
    with pytest.raises(DataError, match="5 elements"):
        encode(np.zeros(6, np.float32), 1, terms())
    with pytest.raises(DataError, match="examples"):
        encode(VALUES, 0, terms())


@pytest.mark.parametrize(
    ("size", "threshold", "length", "clip", "max_weight"),
    [
        (4, 2, 5, 1.0, 1),
        (6, 4, 5, 1.0, 1),  # two thirds are not enough
        (4, 5, 5, 1.0, 1),
        (1, 1, 5, 1.0, 1),
        (MAX_MEMBERS + 1, MAX_MEMBERS, 5, 1.0, 1),
        (4, 3, 0, 1.0, 1),
        (4, 3, 5, math.nan, 1),
        (4, 3, 5, math.inf, 1),
        (4, 3, 5, 0.0, 1),
        (4, 3, 5, 1.0, 0),
        (32, 22, 5, 4.0, 10_000),  # too coarse
        (32, 22, 5, 1e12, 1),
    ],
)
def test_terms_out_of_bounds_are_refused(size: int, threshold: int, length: int, clip: float, max_weight: int) -> None:
    """A threshold with which single vectors can be had, no length, no clip, and a mean that would be off by over 1e-4."""
    with pytest.raises(SettingsError):
        Terms("bad", size, threshold, length, clip, max_weight)


def test_a_sum_with_masks_on_it_is_refused() -> None:
    """Two devices weigh 2 to 32; anything else is a mask that did not cancel."""
    for weight, fine in ((1, False), (2, True), (32, True), (33, False), (2**32 - 1, False)):
        total = np.array([0, 0, 0, 0, 0, weight], np.uint32)
        if fine:
            assert decode(total, terms(), 2)[1] == weight
        else:
            assert refusal(decode, total, terms(), 2) == "bad-sum"


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("at", [0, 4])
def test_a_mean_beyond_the_clip_is_refused(at: int, sign: int) -> None:
    """Two devices of weight 1 whose numbers are cut at 2: one step for each that rounds is fine, a hundred are a lie."""
    edge = 2 * int(terms().clip * terms().scale)
    for steps, fine in ((0, True), (1, True), (100, False), (2**31 - 1 - edge, False)):
        total = np.zeros(6, np.int64)
        total[at], total[-1] = sign * (edge + steps), 2
        if fine:
            assert abs(decode(total.astype(np.uint32), terms(), 2)[0][at] - sign * 2.0) <= terms().error
        else:
            assert refusal(decode, total.astype(np.uint32), terms(), 2) == "bad-sum"


def test_vectors_as_bytes() -> None:
    """Little-endian there and back; another number of bytes is refused."""
    vector = np.array([1, 2**32 - 1, 3, 4, 5, 6], np.uint32)

    assert pack(vector)[:8] == b"\x01\0\0\0\xff\xff\xff\xff"
    assert unpack(pack(vector), terms()).tolist() == vector.tolist()
    for wrong in (pack(vector)[:-1], pack(vector) + b"\0", b""):
        assert refusal(unpack, wrong, terms()) == "wrong-shape"


# Masks ---------------------------------------------------------------------------------------------------------------
def test_a_mask_by_hand() -> None:
    """The first block is AES-256 of zero under the key zero, as everybody publishes it."""
    assert mask(bytes(32), 4).astype("<u4").tobytes().hex() == "dc95c078a2408989ad48a21492842087"


@pytest.mark.parametrize("length", [0, 1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_a_mask_is_one_stream_of_any_length(length: int) -> None:
    """Made in blocks it is what the cipher gives at once, and taking it off leaves what was there."""
    stream = Cipher(algorithms.AES(secret("key")), modes.CTR(bytes(16))).encryptor().update(bytes(4 * length))
    total = np.arange(length, dtype=np.uint32)
    add_mask(total, secret("key"), 1)

    assert (total - np.arange(length, dtype=np.uint32)).tobytes() == np.frombuffer(stream, "<u4").tobytes()
    add_mask(total, secret("key"), -1)
    assert (total == np.arange(length)).all()


def test_a_masked_vector_by_hand() -> None:
    """The formula of the paper, for each device, with a peer that sent no shares left out."""
    senders = ("d-0", "d-1", "d-3")
    bound = binding(ONE.roster)
    keys = {id: mask_private(ONE.members[id]) for id in IDS}
    for position, id in enumerate(IDS):
        if id in senders:
            expected = encode(VALUES, 3, terms()) + mask(self_key(seed(ONE.members[id]), bound, id), 6)
            for other, peer in enumerate(IDS):
                if peer in senders and peer != id:
                    pair = mask(pair_key(keys[id], public_key(keys[peer]), bound, id, peer), 6)
                    expected = expected + pair if position < other else expected - pair
            assert masked(ONE.received(id, senders), VALUES, 3)[1].tolist() == expected.tolist()


def test_a_masked_vector_looks_like_noise() -> None:
    """The bytes of an upload of 2^16 zeros are even: chi-square of 255 degrees below its 99.9th percentile, 330.5."""
    long = Terms("long", size=3, threshold=3, length=1 << 16, clip=1.0, max_weight=1)
    devices = Devices(long, IDS[:3])
    _, vector = masked(devices.received("d-1", IDS[:3]), np.zeros(1 << 16, np.float32), 1)
    counts = np.bincount(np.frombuffer(pack(vector), np.uint8), minlength=256)
    expected = counts.sum() / 256

    assert ((counts - expected) ** 2 / expected).sum() < 330.5


# Shares --------------------------------------------------------------------------------------------------------------
def test_the_field_is_one() -> None:
    """PRIME passes Miller and Rabin's test to 24 bases, and is above every 32 bytes."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89):
        powers = [pow(base, odd << k, PRIME) for k in range(twos)]
        assert powers[0] == 1 or PRIME - 1 in powers

    assert 2**256 < PRIME < 2 ** (8 * SHARE)


def test_shares_by_hand() -> None:
    """5 + 3 x + 2 x^2 modulo 11 at 1, 2 and 3."""
    assert split(5, [3, 2], 3, 11) == [10, 8, 10]
    assert recover({1: 10, 2: 8, 3: 10}, lagrange([1, 2, 3], 11), 11) == 5


@given(st.data(), st.integers(0, 2**256 - 1), st.integers(2, 6))
def test_any_threshold_of_shares_recovers(data: st.DataObject, hidden: int, threshold: int) -> None:
    """Whichever shares they are."""
    coefficients = data.draw(st.lists(st.integers(0, PRIME - 1), min_size=threshold - 1, max_size=threshold - 1))
    shares = split(hidden, coefficients, 8)
    points = data.draw(st.permutations(range(1, 9)))[:threshold]

    assert recover({x: shares[x - 1] for x in points}, lagrange(points)) == hidden


@given(st.data(), st.integers(0, 2**256 - 1), st.integers(0, 2**256 - 1), st.integers(2, 6))
def test_one_share_less_fits_every_secret(data: st.DataObject, hidden: int, other: int, threshold: int) -> None:
    """For any other secret there is a polynomial through it and the same shares."""
    coefficients = data.draw(st.lists(st.integers(0, PRIME - 1), min_size=threshold - 1, max_size=threshold - 1))
    shares = split(hidden, coefficients, 8)
    seen = data.draw(st.permutations(range(1, 9)))[: threshold - 1]
    free = next(x for x in range(1, 9) if x not in seen)
    factors = lagrange([*seen, free])
    rest = sum(factors[x] * shares[x - 1] for x in seen)
    forged = (other - rest) * pow(factors[free], -1, PRIME) % PRIME

    assert recover({**{x: shares[x - 1] for x in seen}, free: forged}, factors) == other


def test_one_share_less_says_nothing() -> None:
    """Modulo 7, over all 49 polynomials of threshold 3, any two shares are each of the 49 pairs once, whatever the secret."""
    for points in itertools.combinations(range(4), 2):
        for hidden in range(7):
            polynomials = itertools.product(range(7), repeat=2)
            seen = Counter(tuple(split(hidden, list(c), 4, 7)[x] for x in points) for c in polynomials)
            assert len(seen) == 49


@pytest.mark.parametrize("speakers", list(itertools.combinations(IDS, 3)))
def test_the_shares_of_any_three_devices_make_the_seed_and_the_key(speakers: tuple[str, ...]) -> None:
    """What peers hold of a device is what its masks were made of; two of them hold too little."""
    points = {IDS.index(id) + 1: ONE.received(id).inbox["d-2"] for id in speakers}
    factors = lagrange(points)
    recovered = [
        recover({x: int.from_bytes(both[part]) for x, both in points.items()}, factors).to_bytes(32)
        for part in (slice(SHARE), slice(SHARE, None))
    ]

    assert recovered == [seed(ONE.members["d-2"]), mask_private(ONE.members["d-2"])]
    assert public_key(recovered[1]) == ONE.roster.members[2].mask_key
    two = {x: int.from_bytes(both[:SHARE]) for x, both in list(points.items())[:2]}
    assert recover(two, lagrange(two)) != int.from_bytes(recovered[0])


def hkdf(key: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, no salt, 32 bytes."""
    return hmac.digest(hmac.digest(bytes(32), key, "sha256"), info + b"\x01", "sha256")


def own(member: Member, label: bytes) -> bytes:
    """By hand, of the secret of a member of the first cohort."""
    return hkdf(member.secret, b"\0".join([b"tandem-edge masking 1", label, b"one", member.device.encode()]))


def seed(member: Member) -> bytes:
    return own(member, b"seed")


def mask_private(member: Member) -> bytes:
    return own(member, b"mask key")


def numbers(device: str, devices: Devices, part: slice) -> list[int]:
    """The shares of its seed or of its key, by position on the roster."""
    ids = devices.roster.ids
    return [int.from_bytes(devices.received(id, ids).inbox[device][part]) for id in ids]


def test_every_polynomial_is_of_its_own() -> None:
    """Seed and key differ by another number in every share, and another roster gets other shares at the same places."""
    of_seed, of_key = numbers("d-0", ONE, slice(SHARE)), numbers("d-0", ONE, slice(SHARE, None))
    other = Devices(terms(), IDS[:3])

    assert len({(a - b) % PRIME for a, b in zip(of_seed, of_key, strict=True)}) == 4
    for part in (slice(SHARE), slice(SHARE, None)):
        assert not set(numbers("d-0", ONE, part)) & set(numbers("d-0", other, part))


def by_hand(sender: str, receiver: str) -> tuple[ChaCha20Poly1305, bytes, bytes]:
    """The cipher, nonce and associated data of what one device seals for another in the first cohort."""
    keys = {member.device: member.cipher_key for member in ONE.roster.members}
    private = X25519PrivateKey.from_private_bytes(own(ONE.members[sender], b"cipher key"))
    parts = [b"tandem-edge masking 1", b"seal", binding(ONE.roster)]
    ids = [sender.encode(), receiver.encode()]
    agreed = private.exchange(X25519PublicKey.from_public_bytes(keys[receiver]))
    nonce = bytes(11) + (b"\x01" if sender < receiver else b"\0")
    return ChaCha20Poly1305(hkdf(agreed, b"\0".join([*parts, *sorted(ids)]))), nonce, b"\0".join([*parts, *ids])


@pytest.mark.parametrize(("sender", "receiver"), [("d-1", "d-0"), ("d-0", "d-1")])
def test_a_sealed_share_by_hand(sender: str, receiver: str) -> None:
    """A pair has one key and a nonce for each direction, so no nonce is used twice; what is no two shares is refused."""
    cipher, nonce, data = by_hand(sender, receiver)
    payload = ONE.received(receiver).inbox[sender]

    assert cipher.encrypt(nonce, payload, data) == ONE.shares[sender].sealed[receiver]
    right = ONE.delivery(receiver, IDS)
    too_large = PRIME.to_bytes(SHARE)
    for wrong in (payload[1:], payload + b"\0", payload[:SHARE] + too_large, too_large + payload[SHARE:]):
        sealed = {**right.sealed, sender: cipher.encrypt(nonce, wrong, data)}
        assert refusal(receive, ONE.members[receiver], replace(right, sealed=sealed)) == "bad-shares"


# Keys ----------------------------------------------------------------------------------------------------------------
def test_a_pair_key_by_hand() -> None:
    """HKDF of X25519's secret, with cohort, roster and both ids in order; the two devices make the same."""
    a, b = secret("a"), secret("b")
    bound = binding(ONE.roster)
    agreed = X25519PrivateKey.from_private_bytes(a).exchange(X25519PublicKey.from_public_bytes(public_key(b)))
    expected = hkdf(agreed, b"\0".join([b"tandem-edge masking 1", b"pair mask", bound, b"d-1", b"d-2"]))

    assert bound == b"one\0" + hashlib.sha256(msgspec.json.encode(ONE.roster)).digest()
    assert binding(OTHER.roster)[:4] == b"two\0"
    assert pair_key(a, public_key(b), bound, "d-2", "d-1") == expected
    assert pair_key(b, public_key(a), bound, "d-1", "d-2") == expected


def test_every_key_is_of_its_own() -> None:
    """Another cohort, roster, pair or purpose gives another key from the same secrets."""
    other = Devices(terms(), IDS[:3])
    bounds = [binding(devices.roster) for devices in (ONE, OTHER, other)]
    made = [pair_key(secret("a"), public_key(secret("b")), bound, "d-1", peer) for bound in bounds for peer in ("d-2", "d-3")]
    made += [self_key(secret("a"), bound, device) for bound in bounds for device in IDS]
    adverts = [key for devices in (ONE, OTHER) for m in devices.roster.members for key in (m.cipher_key, m.mask_key)]

    assert len(set(made)) == len(made)
    assert len(set(adverts)) == 16


@pytest.mark.parametrize("point", sorted(LOW_ORDER))
def test_a_key_of_low_order_is_refused(point: int) -> None:
    """With such a public key the shared secret is zero for everybody: X25519 notices, and a roster's check does before it."""
    low = point.to_bytes(32, "little")

    assert len(LOW_ORDER) == 5
    assert refusal(pair_key, secret("a"), low, b"", "d-0", "d-1") == "bad-keys"
    assert refusal(check_keys, [replace(ONE.roster.members[0], mask_key=low)], ()) == "bad-keys"
    assert refusal(share, ONE.joined["d-0"], with_key(1, cipher_key=low)) == "bad-keys"


def test_a_secret_is_32_bytes() -> None:
    """Fewer are no secret."""
    with pytest.raises(DataError, match="31"):
        join(terms(), "d-0", bytes(31))


# A roster ------------------------------------------------------------------------------------------------------------
def with_key(position: int, **keys: bytes) -> Roster:
    """The roster with another key of one member."""
    members = list(ONE.roster.members)
    members[position] = replace(members[position], **keys)
    return replace(ONE.roster, members=tuple(members))


def of(*members: Advertise) -> Roster:
    return replace(ONE.roster, members=members)


def test_a_roster_that_is_wrong_is_refused() -> None:
    """Each rule by one roster that breaks only it."""
    a, b, c, d = ONE.roster.members
    fifth = join(terms(), "d-4", secret("d-4"))[1]
    not_canonical = (CURVE + 9).to_bytes(32, "little")
    wrong = {
        "too few": (of(a, b), "too-few"),
        "too many": (of(a, b, c, d, fifth), "bad-list"),
        "not itself": (of(b, c, d), "bad-list"),
        "itself with another key": (with_key(0, mask_key=secret("x")), "bad-list"),
        "no order": (of(a, c, b, d), "bad-list"),
        "a device twice": (of(a, b, b, c), "bad-list"),
        "a key twice": (with_key(1, mask_key=c.mask_key), "bad-keys"),
        "a key for both": (with_key(1, mask_key=b.cipher_key), "bad-keys"),
        "its own key at another": (with_key(1, cipher_key=a.mask_key), "bad-keys"),
        "a point written otherwise": (with_key(1, mask_key=not_canonical), "bad-keys"),
        "another cohort": (OTHER.roster, "wrong-cohort"),
        "a member of another cohort": (of(a, replace(b, cohort="two"), c), "wrong-cohort"),
        "other terms": (replace(ONE.roster, terms=replace(terms(), max_weight=2)), "wrong-cohort"),
    }
    for name, (roster, code) in wrong.items():
        assert refusal(share, ONE.joined["d-0"], roster) == code, name
    share(ONE.joined["d-0"], of(a, b, c))


def test_one_roster_for_a_cohort() -> None:
    """The same one again gets the same bytes, another one nothing."""
    assert share(ONE.members["d-0"], ONE.roster) == (ONE.members["d-0"], ONE.shares["d-0"])
    assert refusal(share, ONE.members["d-0"], of(*ONE.roster.members[:3])) == "already-answered"


# Sealed shares -------------------------------------------------------------------------------------------------------
@given(st.sampled_from(IDS[1:]), st.integers(0, SEALED - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed(sender: str, at: int, by: int) -> None:
    """Wherever it is."""
    delivery = ONE.delivery("d-0", IDS)
    damaged = bytearray(delivery.sealed[sender])
    damaged[at] ^= by
    changed = replace(delivery, sealed={**delivery.sealed, sender: bytes(damaged)})

    assert refusal(receive, ONE.members["d-0"], changed) == "bad-shares"


def test_shares_open_only_where_they_belong() -> None:
    """From another sender, for another device, sent back, or of another cohort or roster: nothing opens."""
    right = ONE.delivery("d-0", IDS)
    other_roster = Devices(replace(terms(), max_weight=15))
    foreign = {
        "another sender's": ONE.shares["d-2"].sealed["d-0"],
        "another device's": ONE.shares["d-1"].sealed["d-2"],
        "its own, sent back": ONE.shares["d-0"].sealed["d-1"],
        "another cohort's": OTHER.shares["d-1"].sealed["d-0"],
        "another roster's": other_roster.shares["d-1"].sealed["d-0"],
        "short": b"",
    }
    for name, sealed in foreign.items():
        wrong = replace(right, sealed={**right.sealed, "d-1": sealed})
        assert refusal(receive, ONE.members["d-0"], wrong) == "bad-shares", name


def test_a_delivery_that_is_wrong_is_refused() -> None:
    """Of another cohort or device, from nobody on the roster or itself, of too few, before a roster, or a second one."""
    member, right = ONE.members["d-0"], ONE.delivery("d-0", IDS)
    some = right.sealed["d-1"]

    assert refusal(receive, member, OTHER.delivery("d-0", IDS)) == "wrong-cohort"
    assert refusal(receive, member, replace(right, device="d-1")) == "bad-list"
    assert refusal(receive, member, replace(right, sealed={**right.sealed, "d-9": some})) == "bad-list"
    assert refusal(receive, member, replace(right, sealed={**right.sealed, "d-0": some})) == "bad-list"
    assert refusal(ONE.received, "d-0", IDS[:2]) == "too-few"
    assert refusal(receive, ONE.joined["d-0"], right) == "too-early"
    received = receive(member, right)
    assert receive(received, right) == received
    assert refusal(receive, received, ONE.delivery("d-0", IDS[:3])) == "already-answered"


# Uploads and reveals -------------------------------------------------------------------------------------------------
def test_one_vector_for_a_cohort() -> None:
    """The same again gives the same bytes; another one, or another weight, would tell the difference of the two."""
    assert refusal(masked, ONE.joined["d-0"], VALUES, 1) == "too-early"
    assert refusal(masked, ONE.members["d-0"], VALUES, 1) == "too-early"
    member, vector = masked(ONE.received("d-0"), VALUES, 3)
    again, same = masked(member, VALUES, 3)

    assert again == member
    assert same.tolist() == vector.tolist()
    assert refusal(masked, member, VALUES + np.float32(0.01), 3) == "already-answered"
    assert refusal(masked, member, VALUES, 4) == "already-answered"


def uploaded(device: str) -> Member:
    return masked(ONE.received(device), VALUES, 3)[0]


def test_what_is_revealed() -> None:
    """The seed's share for those that survived, the key's for those that did not, and the same again to the same list."""
    member = uploaded("d-0")
    asked = Survivors("one", ("d-0", "d-1", "d-3"), ("d-2",))
    after, reveal = unmask_shares(member, asked)

    assert reveal.seeds == {id: member.inbox[id][:SHARE] for id in ("d-0", "d-1", "d-3")}
    assert reveal.keys == {"d-2": member.inbox["d-2"][SHARE:]}
    assert unmask_shares(after, asked) == (after, reveal)
    assert unmask_shares(after, Survivors("one", ("d-3", "d-1", "d-0"), ("d-2",)))[1] == reveal


def test_a_list_that_lies_gets_nothing() -> None:
    """Each rule by one list that breaks it."""
    wrong = {
        "both kinds for one device": (Survivors("one", IDS, ("d-3",)), "bad-list"),
        "twice on one list": (Survivors("one", (*IDS, "d-3"), ()), "bad-list"),
        "unknown survivor": (Survivors("one", (*IDS, "d-9"), ()), "bad-list"),
        "unknown dropped": (Survivors("one", IDS, ("d-9",)), "bad-list"),
        "one on neither": (Survivors("one", IDS[:3], ()), "bad-list"),
        "itself dropped": (Survivors("one", IDS[1:], ("d-0",)), "bad-list"),
        "too few": (Survivors("one", IDS[:2], IDS[2:]), "too-few"),
        "another cohort": (Survivors("two", IDS, ()), "wrong-cohort"),
    }
    for name, (asked, code) in wrong.items():
        assert refusal(unmask_shares, uploaded("d-0"), asked) == code, name
    assert refusal(unmask_shares, ONE.received("d-0"), Survivors("one", IDS, ())) == "too-early"


def test_a_second_list_gets_nothing() -> None:
    """Asked for the seed of a device first, it does not give the key, nor the other way round."""
    survived, dropped = Survivors("one", IDS, ()), Survivors("one", IDS[:3], ("d-3",))
    for first, second in ((survived, dropped), (dropped, survived)):
        after, _ = unmask_shares(uploaded("d-0"), first)
        assert refusal(unmask_shares, after, second) == "already-answered"


def test_a_device_that_was_killed_goes_on_with_the_same_bytes() -> None:
    """A member's JSON is all it must keep: at every step the one read back answers as the one that was written."""

    def reread(member: Member) -> Member:
        return msgspec.json.decode(msgspec.json.encode(member), type=Member)

    member, advert = join(terms(), "d-0", secret("d-0"))
    assert join(terms(), "d-0", secret("d-0"))[1] == advert
    member, message = share(reread(member), ONE.roster)
    assert message == ONE.shares["d-0"]
    member = receive(reread(member), ONE.delivery("d-0", IDS))
    assert reread(member) == member
    member, vector = masked(reread(member), VALUES, 3)
    assert masked(reread(member), VALUES, 3)[1].tolist() == vector.tolist()
    member, reveal = unmask_shares(reread(member), Survivors("one", IDS, ()))
    assert unmask_shares(reread(member), Survivors("one", IDS, ())) == (member, reveal)


# A server that lies --------------------------------------------------------------------------------------------------
class Split:
    """A server that owns no device tells each another story, to get the vector of the first: that one hears of as few peers as
    it may, the others in turn that some of these have dropped out.

    Args:
        lacks: how many shares of the mask key of each of these peers it does not get.
    """

    def __init__(self, of: Terms) -> None:
        self.ids = [f"d-{k}" for k in range(of.size)]
        self.victim, self.peers = self.ids[0], self.ids[1 : of.threshold]
        self.devices, self.reveals = Devices(of, self.ids), list[Reveal]()
        self.lacks = dict.fromkeys(self.peers, of.threshold)
        for id in self.ids:
            told = [self.victim, *self.peers] if id == self.victim else self.ids
            member, vector = masked(self.devices.received(id, told), VALUES, 3)
            if id == self.victim:
                self.vector, dropped = vector, list[str]()
            else:
                wanted = [peer for peer in self.peers if peer != id and self.lacks[peer]]
                dropped = sorted(wanted, key=lambda peer: -self.lacks[peer])[: of.size - of.threshold]
            for peer in dropped:
                self.lacks[peer] -= 1
            survivors = Survivors(of.cohort, tuple(other for other in told if other not in dropped), tuple(dropped))
            self.reveals.append(unmask_shares(member, survivors)[1])

    def bare(self) -> Ring:
        """The first device's vector without any mask."""
        bound, vector, own = binding(self.devices.roster), self.vector.copy(), self.devices.roster.members[0].mask_key
        add_mask(vector, self_key(self._secret("seeds", self.victim), bound, self.victim), -1)
        for peer in self.peers:  # which come after it, so it has added their masks
            add_mask(vector, pair_key(self._secret("keys", peer), own, bound, peer, self.victim), -1)
        return vector

    def _secret(self, kind: str, device: str) -> bytes:
        told = {self.ids.index(said.device) + 1: getattr(said, kind).get(device) for said in self.reveals}
        shares = {x: int.from_bytes(share) for x, share in told.items() if share is not None}
        some = dict([*shares.items()][: self.devices.roster.terms.threshold])
        return recover(some, lagrange(some)).to_bytes(32)


LET_THROUGH = [(size, threshold) for size in range(2, MAX_MEMBERS + 1) for threshold in range(size * 2 // 3 + 1, size + 1)]


def test_different_lists_tell_too_few_shares_for_one_vector() -> None:
    """`Quorum`'s count, for every size and threshold that is let through; one threshold less is not."""
    for size, threshold in LET_THROUGH:
        of = Terms("c", size, threshold, 1, 1.0, 1)
        assert 2 * of.threshold > of.size
        assert (of.threshold - 1) * of.threshold > of.size * (of.size - of.threshold)
    for size in range(2, MAX_MEMBERS + 1):
        with pytest.raises(SettingsError, match="more than two thirds"):
            Terms("c", size, size * 2 // 3, 1, 1.0, 1)


@pytest.mark.parametrize(("size", "threshold"), [of for of in LET_THROUGH if of[0] <= 9])
def test_a_server_that_splits_a_cohort_lacks_shares(size: int, threshold: int) -> None:
    """It gets what each of the others may say, (size - threshold) keys' shares, and needs `threshold` for each peer."""
    server = Split(Terms("split", size, threshold, 5, 2.0, 16))
    dropped = [len(said.keys) for said in server.reveals]

    assert dropped == [0] + [size - threshold] * (size - 1)
    assert sum(server.lacks.values()) == (threshold - 1) * threshold - sum(dropped) > 0


@pytest.mark.parametrize(("size", "threshold"), [(5, 3), (7, 4), (8, 5)])
def test_with_more_than_half_it_would_lack_none(size: int, threshold: int) -> None:
    """The same server where no rule is in its way has one device's vector, bare, so the test above can fail."""
    of = Terms("split", size, size, 5, 2.0, 16)
    msgspec.structs.force_setattr(of, "threshold", threshold)
    server = Split(of)

    assert not any(server.lacks.values())
    assert server.bare().tolist() == encode(VALUES, 3, of).tolist()


def test_a_member_does_not_print_its_secrets() -> None:
    """Logs show who it is and no more."""
    assert repr(ONE.received("d-0")) == "Member('d-0' of cohort 'one')"


# Bounds --------------------------------------------------------------------------------------------------------------
KEY, PIECE, BOX = bytes(32), bytes(SHARE), bytes(SEALED)
MANY = tuple(f"d-{k}" for k in range(MAX_MEMBERS + 1))
TOO_LONG = "d" * 65


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (terms(), {"cohort": ""}),
        (terms(), {"cohort": "one two"}),
        (terms(), {"cohort": TOO_LONG}),
        (ONE.roster.members[0], {"device": "d\n"}),
        (ONE.roster.members[0], {"device": "d\0"}),
        (ONE.roster.members[0], {"cipher_key": bytes(31)}),
        (ONE.roster.members[0], {"mask_key": bytes(33)}),
        (ONE.roster, {"members": ONE.roster.members * 33}),
        (Shares("one", "d", {"e": BOX}), {"sealed": {"e": BOX[1:]}}),
        (Shares("one", "d", {"e": BOX}), {"sealed": {"e": BOX + b"\0"}}),
        (Shares("one", "d", {"e": BOX}), {"sealed": {TOO_LONG: BOX}}),
        (Shares("one", "d", {"e": BOX}), {"sealed": dict.fromkeys(MANY, BOX)}),
        (Delivery("one", "d", {"e": BOX}), {"sealed": {"e": b""}}),
        (Delivery("one", "d", {"e": BOX}), {"sealed": dict.fromkeys(MANY, BOX)}),
        (Masked("one", "d"), {"device": "../d"}),
        (Survivors("one", ("d",), ()), {"survived": MANY}),
        (Survivors("one", ("d",), ()), {"dropped": MANY}),
        (Survivors("one", ("d",), ()), {"dropped": ("",)}),
        (Reveal("one", "d", {"d": PIECE}, {}), {"seeds": {"d": PIECE[1:]}}),
        (Reveal("one", "d", {"d": PIECE}, {}), {"keys": {"d": PIECE + b"\0"}}),
        (Reveal("one", "d", {"d": PIECE}, {}), {"seeds": dict.fromkeys(MANY, PIECE)}),
        (Reveal("one", "d", {"d": PIECE}, {}), {"keys": dict.fromkeys(MANY, PIECE)}),
    ],
)
def test_messages_are_bounded(right: msgspec.Struct, wrong: dict[str, object]) -> None:
    """A message goes through JSON and back; with one field out of bounds it does not come back."""
    assert wire.decode(wire.encode(right), type(right)) == right
    assert refusal(wire.decode, wire.encode(replace(right, **wrong)), type(right)) == "bad-message"


@given(st.binary(max_size=60) | st.just(wire.encode(ONE.shares["d-0"])).flatmap(strategies.damaged))
def test_damaged_messages_are_refused_or_harmless(body: bytes) -> None:
    """Whatever bytes arrive as shares, they decode to a message within bounds or not at all."""
    try:
        found = wire.decode(body, Shares)
    except WireError:
        return
    assert all(len(sealed) == SEALED for sealed in found.sealed.values())


def test_the_sdk_does_without_cryptography() -> None:
    """Importing the SDK, and its agent and server simulator, loads neither this module nor the package it needs."""
    code = (
        "import edge_sdk, edge_sdk.agent, edge_sdk.testing, sys; print({'cryptography', 'edge_sdk.masking'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"
