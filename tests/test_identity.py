"""Signed requests: the golden ones, that nothing in them can be changed, and that each is taken once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import identity
from edge_sdk.errors import DataError, WireError
from edge_sdk.identity import NO_EPOCH, Claim, Clock
from edge_server.gate import MOST, SKEW, Gate
from tests.golden import regenerate

SEED = bytes(range(32))
EPOCH = "00112233445566aa"
GOLDEN: list[dict[str, Any]] = json.loads(regenerate.REQUESTS_FILE.read_text())

words = st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), max_size=20)
hexes = st.text("0123456789abcdef", min_size=16, max_size=16)
times = st.integers(0, 10**12 - 1)
claims = st.builds(
    Claim, st.just(identity.device_id(SEED)), times, hexes, hexes, st.binary().map(lambda body: hashlib.sha256(body).hexdigest())
)


def claim(time: int = 1000, epoch: str = EPOCH, nonce: str = "0" * 16, device: str = "ab" * 32) -> Claim:
    return Claim(device, time, epoch, nonce, "cd" * 32)


def refused(code: str) -> Any:
    return pytest.raises(WireError, match=f"^{code}: ")


# Golden vectors -------------------------------------------------------------------------------------------------------
def test_the_golden_requests_are_what_we_sign() -> None:
    """Keys, nonces and times given, the headers are these to the byte: Ed25519 has no randomness."""
    assert regenerate.requests() == GOLDEN


@pytest.mark.parametrize("golden", GOLDEN)
def test_the_golden_requests_are_ed25519_over_their_base(golden: dict[str, Any]) -> None:
    """Checked without our code: the key signs the text that stands there, and the headers carry its parts."""
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(golden["seed"]))
    parameters = golden["headers"]["Signature-Input"].removeprefix("edge=")
    digest = golden["headers"]["Content-Digest"]

    assert golden["base"].split("\n") == [
        f'"@method": {golden["method"]}',
        f'"@path": {golden["path"]}',
        f'"@query": ?{golden["query"]}',
        f'"content-digest": {digest}',
        f'"@signature-params": {parameters}',
    ]
    assert golden["device"] == key.public_key().public_bytes_raw().hex()
    assert identity.read(golden["headers"]) == (
        Claim(
            golden["device"],
            golden["time"],
            golden["epoch"],
            golden["nonce"],
            hashlib.sha256(golden["body"].encode()).hexdigest(),
        ),
        key.sign(golden["base"].encode()),
    )


def test_the_id_is_the_public_key() -> None:
    """The first key of RFC 8032, section 7.1, and its public key."""
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")

    assert identity.device_id(seed) == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_damaged_key_is_no_key(length: int) -> None:
    with pytest.raises(DataError, match="32 bytes"):
        identity.device_id(bytes(length))


# What a signature covers ----------------------------------------------------------------------------------------------
@given(st.sampled_from(["GET", "POST"]), words, words, claims)
def test_what_is_signed_verifies(method: str, path: str, query: str, said: Claim) -> None:
    """What the headers say is what was claimed, and the device's."""
    headers = identity.sign(SEED, method, path, query, said)

    found, signature = identity.read(headers)

    assert found == said
    identity.verify(method, path, query, found, signature)


@given(
    st.sampled_from(["GET", "POST"]),
    *(words, words, claims),
    st.sampled_from(["method", "path", "query", "device", "time", "epoch", "nonce", "sha256"]),
    st.data(),
)
def test_any_change_breaks_the_signature(method: str, path: str, query: str, said: Claim, what: str, data: st.DataObject) -> None:
    """Method, path, query, device, time, epoch, nonce and body are signed: another value of any one is refused."""
    _, signature = identity.read(identity.sign(SEED, method, path, query, said))
    parts = {"method": method, "path": path, "query": query}
    values: dict[str, st.SearchStrategy[Any]] = {
        **dict.fromkeys(parts, words),
        **dict.fromkeys(("epoch", "nonce"), hexes),
        "time": times,
        "device": st.sampled_from([identity.device_id(bytes(32)), "00" * 32, "ff" * 32]),
        "sha256": st.binary().map(lambda body: hashlib.sha256(body).hexdigest()),
    }
    old = parts.get(what, getattr(said, what, None))
    new = data.draw(values[what].filter(lambda value: value != old))
    if what in parts:
        parts[what] = new
    else:
        said = replace(said, **{what: new})

    with refused("bad-signature"):
        identity.verify(parts["method"], parts["path"], parts["query"], said, signature)


@given(claims, st.integers(0, 511))
def test_any_bit_of_the_signature_counts(said: Claim, bit: int) -> None:
    _, signature = identity.read(identity.sign(SEED, "GET", "/", "", said))
    changed = bytes(byte ^ (1 << bit % 8 if i == bit // 8 else 0) for i, byte in enumerate(signature))

    with refused("bad-signature"):
        identity.verify("GET", "/", "", said, changed)


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("Content-Digest", "Signature-Input", "Signature"), st.text(max_size=300)))
)
def test_hostile_headers_are_refused_by_code(headers: dict[str, str]) -> None:
    """Whatever stands in the three headers: a claim or a refusal, and nothing else."""
    with pytest.raises(WireError) as caught:
        identity.read(headers)

    assert caught.value.code in ("unsigned", "bad-signature")
    assert caught.value.status == 401


@pytest.mark.parametrize(
    ("header", "old", "new"),
    [
        ("Signature-Input", '"@query" ', ""),
        ("Signature-Input", '"@method" "@path"', '"@path" "@method"'),
        ("Signature-Input", "created=1764000000", "created=01764000000"),
        ("Signature-Input", "created=1764000000", "created=1764000000000"),
        ("Signature-Input", "created=1764000000", "created=-5"),
        ("Signature-Input", "ed25519", "hmac-sha256"),
        ("Signature-Input", ';alg="ed25519"', ';alg="ed25519";tag="x"'),
        ("Signature-Input", "edge=", "other="),
        ("Signature-Input", "edge=", "edge=();created=1, edge="),
        ("Content-Digest", "sha-256", "sha-512"),
        ("Signature", "edge=:", "edge=:A"),
    ],
)
def test_there_is_one_form(header: str, old: str, new: str) -> None:
    """Other components, parameters, orders or spellings are refused, so what is covered is not the sender's choice."""
    headers = GOLDEN[0]["headers"]
    assert old in headers[header]

    with refused("bad-signature"):
        identity.read({**headers, header: headers[header].replace(old, new)})


def test_another_spelling_of_the_digest_is_refused() -> None:
    """Base64 leaves bits unused; with others in them it says the same, but was not what was signed."""
    digest = GOLDEN[0]["headers"]["Content-Digest"]
    other = f"{digest[:-3]}{chr(ord(digest[-3]) + 1)}{digest[-2:]}"

    with refused("bad-signature"):
        identity.read({**GOLDEN[0]["headers"], "Content-Digest": other})


# The server's clock ---------------------------------------------------------------------------------------------------
@given(hexes, times)
def test_a_clock_is_read_as_it_is_told(epoch: str, time: int) -> None:
    assert identity.clock(Clock(epoch, time).header) == Clock(epoch, time)


@pytest.mark.parametrize("header", ["", "Bearer", 'Signature epoch="0", time=1', f'Signature epoch="{EPOCH}", time={10**12}'])
def test_what_is_no_clock_tells_none(header: str) -> None:
    assert identity.clock(header) is None


# Once, and in time ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("off", [-SKEW, 0, SKEW])
def test_a_clock_may_be_five_minutes_wrong(off: float) -> None:
    Gate(EPOCH).check_time(claim(1000), 1000 - off)


@pytest.mark.parametrize(("off", "said"), [(-SKEW - 1, "301 seconds behind"), (SKEW + 1, "301 seconds ahead")])
def test_a_clock_that_is_further_off_is_told_so(off: float, said: str) -> None:
    with refused("wrong-time") as caught:
        Gate(EPOCH).check_time(claim(1000), 1000 - off)

    assert said in str(caught.value)


@pytest.mark.parametrize("epoch", [NO_EPOCH, "ffffffffffffffff"])
def test_what_was_signed_for_another_start_is_refused(epoch: str) -> None:
    """A server forgets its nonces when it stops, so it takes nothing that it could have taken before."""
    with refused("wrong-time"):
        Gate(EPOCH).check_time(claim(1000, epoch), 1000)


def test_a_request_is_taken_once() -> None:
    """The same nonce is refused; another one, or another device's, is not."""
    found = Gate(EPOCH)
    found.take(claim(), 1000)

    with refused("replayed"):
        found.take(claim(), 1001)
    found.take(claim(nonce="1" * 16), 1001)
    found.take(claim(device="cd" * 32), 1001)


@given(st.floats(-SKEW, SKEW), st.floats(0, 4 * SKEW))
def test_a_nonce_is_forgotten_only_when_its_request_is_too_old(ahead: float, later: float) -> None:
    """At any later time the same request is either known, or refused for its time."""
    found, said = Gate(EPOCH), claim(int(10_000 + ahead))
    found.check_time(said, 10_000)
    found.take(said, 10_000)

    def again(now: float) -> None:
        found.check_time(said, now)
        found.take(said, now)

    with pytest.raises(WireError, match=r"^(replayed|wrong-time): "):
        again(10_000 + later)


def test_what_is_remembered_is_bounded() -> None:
    """A device that floods is refused, others are not; ten minutes later it may go on, and nothing of before is left."""
    found = Gate(EPOCH)
    for number in range(MOST):
        found.take(claim(nonce=f"{number:016x}"), 1000)

    with refused("too-many") as caught:
        found.take(claim(nonce="f" * 16), 1000)
    found.take(claim(device="cd" * 32), 1000)
    found.take(claim(nonce="f" * 16), 1000 + 2 * SKEW + 1)

    assert caught.value.status == 429
    assert len(found) == 1


@pytest.mark.parametrize("after", [0.0, 0.25, 2 * SKEW - 1, 2 * SKEW])
def test_a_device_that_floods_is_told_when_it_may_go_on(after: float) -> None:
    """In whole seconds, once the first of its own requests is forgotten: by then one more is taken, and one second before not.

    What others sent before is forgotten earlier, and does not count.
    """
    found, start = Gate(EPOCH), 1000.5
    found.take(claim(device="cd" * 32), 900)
    for number in range(MOST):
        found.take(claim(nonce=f"{number:016x}"), start + (number > 0) * after)

    with refused("too-many") as caught:
        found.take(claim(nonce="f" * 16), start + after)
    told = caught.value.retry_after
    assert told is not None
    assert told == int(told) >= 1
    with refused("too-many"):
        found.take(claim(nonce="f" * 16), start + after + told - 1)
    found.take(claim(nonce="f" * 16), start + after + told)
