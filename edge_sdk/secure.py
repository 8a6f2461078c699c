"""What a device says in secure averaging; what it must remember of it is on disk before it is said.

What a device learned goes into one sum: of two, with and without it, the difference would tell it. So it forgets the training
once it has revealed shares for a cohort, and has no part in another with that version, or an older one.

`masking.py` computes what is said. Needs `cryptography`, so nothing else here imports this module at its top.
"""

from __future__ import annotations

import os

import numpy as np
from msgspec.structs import replace

from edge_sdk import files, masking, wire
from edge_sdk.adapters import Array, Arrays
from edge_sdk.cohort import Answer, Join, Mask, Masked, Request, SealShares
from edge_sdk.errors import DataError
from edge_sdk.masking import Member
from edge_sdk.protocol import Manifest, Update
from edge_sdk.store import MEMBER, SPENT, UNSEEN, Parcel, Store


def keep(store: Store, update: Update, delta: Arrays) -> None:
    """Keeps what was learned until a cohort averages it."""
    files.write(store.home / UNSEEN, wire.pack(update, delta))


def check_unspent(store: Store, version: int) -> None:
    """Raises: DataError: what this device learned from `version`, or from a newer one, has been averaged."""
    if version <= (spent := _spent(store)):
        raise DataError(f"what this device learned from version {spent} was averaged; it takes part again from a newer one on")


def speak(store: Store, manifest: Manifest, request: Request) -> Parcel:
    """The answer to a request of the cohort; the same again where it has been given before.

    Raises:
        WireError: the request is one that `masking` refuses.
        DataError: the device has lost its keys, or what it learned; or that was averaged before.
    """
    member = _member(store)
    if isinstance(request, Join):
        if member is not None and member.terms == request.terms:  # asked again, it forgets nothing of what it has answered
            return _say(store, member, masking.join(request.terms, member.device, member.secret)[1])
        check_unspent(store, request.version)
        return _say(store, *masking.join(request.terms, store.device_id, os.urandom(32)))
    if member is None:
        raise DataError("this device has lost its keys of the cohort; it takes part in the next one")
    if isinstance(request, SealShares):
        return _say(store, *masking.share(member, request.roster))
    if isinstance(request, Mask):
        values, weight = _learned(store, manifest, request.version)
        member, vector = masking.masked(masking.receive(member, request.delivery), values, weight)
        masked = Masked(member.terms.cohort, member.device)
        return _say(store, replace(member, version=request.version), masked, wire.pack_masked(masked, vector))
    member, shown = masking.unmask_shares(member, request.survivors)
    store.set_fact(SPENT, str(max(member.version, _spent(store))))
    (store.home / UNSEEN).unlink(missing_ok=True)
    return _say(store, member, shown)


def told(request: Request) -> str:
    """A request in words."""
    match request:
        case Join():
            return "sent keys"
        case SealShares():
            return "sent shares"
        case Mask():
            return "sent what it learned, masked"
        case _:
            return "helped to take the masks off"


def _say(store: Store, member: Member, said: Answer, body: bytes = b"") -> Parcel:
    store.set_fact(MEMBER, wire.encode(member).decode())
    return Parcel(wire.MASKED_TYPE, body) if body else Parcel(wire.JSON_TYPE, wire.encode(said))


def _spent(store: Store) -> int:
    return int(store.fact(SPENT) or -1)


def _member(store: Store) -> Member | None:
    known = store.fact(MEMBER)
    return None if known is None else wire.decode(known.encode(), Member)


def _learned(store: Store, manifest: Manifest, version: int) -> tuple[Array, int]:
    """The arrays of the update, one after the other by name, and how many examples it rests on."""
    check_unspent(store, version)
    path = store.home / UNSEEN
    if not path.exists():
        raise DataError(f"what this device learned from version {version} is lost")
    update, delta = wire.unpack(path.read_bytes(), wire.update_shapes(manifest))
    if update.version != version:
        raise DataError(f"what this device learned last is from version {update.version}, not {version}")
    return np.concatenate([delta[name].ravel() for name in sorted(delta)]), update.num_examples
