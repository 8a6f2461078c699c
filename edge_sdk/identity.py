"""Who sends a request: an Ed25519 key, and HTTP message signatures over everything that a request means; pure.

The form is RFC 9421 with the digest of RFC 9530, narrowed to one shape: always the same four components and four parameters, in
one order, so that a client of another language needs no parser and `tests/golden/requests.json` says all. A device's id is its
public key in hex: nobody can claim another's, and a server has no key to keep or to mix up. A nonce begins with the server's
epoch, which is new each time it starts, so a restart forgets no request that could still come again.

Needs the package `cryptography`, so nothing that a device always loads imports this module at its top.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_sdk.errors import DataError, WireError

SEED = 32  # bytes of a private key
NO_EPOCH = "0" * 16  # of a device that has not heard from the server yet
_COMPONENTS = '("@method" "@path" "@query" "content-digest")'
_INPUT = re.compile(
    r'edge=\("@method" "@path" "@query" "content-digest"\)'
    r';created=(0|[1-9][0-9]{0,11});nonce="([0-9a-f]{16})([0-9a-f]{16})";keyid="([0-9a-f]{64})";alg="ed25519"'
)
_SIGNATURE = re.compile(r"edge=:([A-Za-z0-9+/]{86}==):")
_DIGEST = re.compile(r"sha-256=:([A-Za-z0-9+/]{43}=):")
_CLOCK = re.compile(r'Signature epoch="([0-9a-f]{16})", time=(0|[1-9][0-9]{0,11})')


@dataclass(frozen=True)
class Clock:
    """What a server tells with every 401: its epoch, 16 hex digits, and its time, seconds since 1970."""

    epoch: str
    time: int

    @property
    def header(self) -> str:
        """As it stands in `WWW-Authenticate`."""
        return f'Signature epoch="{self.epoch}", time={self.time}'


@dataclass(frozen=True)
class Claim:
    """What a request says of itself.

    Args:
        device: id, which is the public key, 64 hex digits. time: of signing, seconds since 1970.
        epoch: of the server. nonce: unlike every other one of this device. Both are 16 hex digits.
        sha256: of the body, in hex.
    """

    device: str
    time: int
    epoch: str
    nonce: str
    sha256: str


def device_id(seed: bytes) -> str:
    """The id of the device with this private key. Raises: DataError: it has not 32 bytes."""
    return _private(seed).public_key().public_bytes_raw().hex()


def canonical(method: str, path: str, query: str, claim: Claim) -> bytes:
    """What is signed: the signature base of RFC 9421, section 2.5.

    Args:
        path, query: as they stand in the request line; the query without its question mark.
    """
    lines = (
        f'"@method": {method}',
        f'"@path": {path}',
        f'"@query": ?{query}',
        f'"content-digest": {_digest(claim)}',
        f'"@signature-params": {_parameters(claim)}',
    )
    return "\n".join(lines).encode()


def sign(seed: bytes, method: str, path: str, query: str, claim: Claim) -> dict[str, str]:
    """The headers that make a request the device's. Raises: DataError: the private key has not 32 bytes."""
    signature = _private(seed).sign(canonical(method, path, query, claim))
    return {
        "Content-Digest": _digest(claim),
        "Signature-Input": f"edge={_parameters(claim)}",
        "Signature": f"edge=:{base64.b64encode(signature).decode()}:",
    }


def read(headers: Mapping[str, str]) -> tuple[Claim, bytes]:
    """What a request says of itself, not yet believed, and the signature.

    Raises:
        WireError: `unsigned`: no signature; `bad-signature`: not in the one form.
    """
    texts = [headers.get(name) for name in ("Content-Digest", "Signature-Input", "Signature")]
    if texts[1] is None and texts[2] is None:
        raise WireError("unsigned", "this server knows its devices: give this one a token, edge-agent join --token TOKEN", 401)
    found = [form.fullmatch(text or "") for form, text in zip((_DIGEST, _INPUT, _SIGNATURE), texts, strict=True)]
    digest, parameters, signature = found
    if digest is None or parameters is None or signature is None:
        raise WireError("bad-signature", "Content-Digest, Signature-Input or Signature is missing or has another form", 401)
    time, epoch, nonce, device = parameters.groups()
    claim = Claim(device, int(time), epoch, nonce, base64.b64decode(digest[1]).hex())
    if _digest(claim) != digest[0]:  # base64 has more than one spelling
        raise WireError("bad-signature", "Content-Digest is not in canonical base64", 401)
    return claim, base64.b64decode(signature[1])


def verify(method: str, path: str, query: str, claim: Claim, signature: bytes) -> None:
    """Raises: WireError: `bad-signature`: the device has not signed this."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(claim.device))
        key.verify(signature, canonical(method, path, query, claim))
    except (InvalidSignature, ValueError) as error:
        raise WireError("bad-signature", "the signature is not this device's for this request", 401) from error


def clock(header: str) -> Clock | None:
    """The server's clock out of `WWW-Authenticate`; None where it tells none."""
    found = _CLOCK.fullmatch(header)
    return None if found is None else Clock(found[1], int(found[2]))


def claim(seed: bytes, body: bytes, clock: Clock, nonce: str) -> Claim:
    """What a device says of a request with this body."""
    return Claim(device_id(seed), clock.time, clock.epoch, nonce, hashlib.sha256(body).hexdigest())


def _private(seed: bytes) -> Ed25519PrivateKey:
    if len(seed) != SEED:
        raise DataError(f"a device's key has {SEED} bytes, not {len(seed)}")
    return Ed25519PrivateKey.from_private_bytes(seed)


def _digest(claim: Claim) -> str:
    return f"sha-256=:{base64.b64encode(bytes.fromhex(claim.sha256)).decode()}:"


def _parameters(claim: Claim) -> str:
    return f'{_COMPONENTS};created={claim.time};nonce="{claim.epoch}{claim.nonce}";keyid="{claim.device}";alg="ed25519"'
