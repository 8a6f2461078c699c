"""A device's key on disk, and a transport that signs with it and corrects itself by the server's clock.

A device without a battery for its clock starts in 1970: it is refused once, told the time, and repeats.
"""

from __future__ import annotations

import importlib.util
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk import files
from edge_sdk.errors import MissingRuntime, WireError
from edge_sdk.protocol import Problem
from edge_sdk.store import Store
from edge_sdk.transport import Response, Transport
from edge_sdk.wire import MAX_JSON, decode

if TYPE_CHECKING:  # it brings cryptography, which only a device with a key needs
    from edge_sdk.identity import Clock

KEY = "device.key"


def signing(store: Store, transport: Transport, token: str = "") -> Transport:
    """The way to a server for this device: signed, if it has a key, or is given a token, with which it makes one.

    Raises:
        MissingRuntime: the secure extra is not installed. DataError: the key is damaged.
    """
    path = store.home / KEY
    if not token and not path.exists():
        return transport
    if importlib.util.find_spec("cryptography") is None:
        raise MissingRuntime("this device signs what it sends, which needs cryptography: pip install 'tandem-edge[secure]'")
    from edge_sdk import identity

    seed = files.secret(path, lambda: secrets.token_bytes(identity.SEED))
    store.become(identity.device_id(seed))
    return Signed(transport, seed)


class Signed:
    """Signs every request to the transport below.

    Args:
        seed: the private key, 32 bytes.
        now: seconds since 1970, as well as the device knows.
    """

    def __init__(self, transport: Transport, seed: bytes, now: Callable[[], float] = time.time) -> None:
        from edge_sdk import identity

        self._identity = identity
        self._transport = transport
        self._seed = seed
        self._now = now
        self._epoch, self._behind = identity.NO_EPOCH, 0.0  # seconds that the device's clock is behind the server's

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        into: Path | None = None,
        limit: int = MAX_JSON,
    ) -> Response:
        answer = await self._transport.request(method, path, body, self._signed(method, path, body, headers), into, limit)
        if (clock := self._told(answer)) is None:
            return answer
        self._epoch, self._behind = clock.epoch, clock.time - self._now()
        return await self._transport.request(method, path, body, self._signed(method, path, body, headers), into, limit)

    def _signed(self, method: str, path: str, body: bytes, headers: Mapping[str, str] | None) -> dict[str, str]:
        clock = self._identity.Clock(self._epoch, max(0, int(self._now() + self._behind)))
        claim = self._identity.claim(self._seed, body, clock, secrets.token_hex(8))
        path, _, query = path.partition("?")
        return {**(headers or {}), **self._identity.sign(self._seed, method, path, query, claim)}

    def _told(self, answer: Response) -> Clock | None:
        """The server's clock, where that is why it refused."""
        if answer.status != 401:
            return None
        try:
            code = decode(answer.body, Problem).code
        except WireError:
            return None
        return self._identity.clock(answer.headers.get("WWW-Authenticate", "")) if code == "wrong-time" else None
