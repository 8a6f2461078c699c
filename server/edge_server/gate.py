"""Which signed requests are new: the window of time, and the nonces inside it; pure.

A request is taken once. Within `SKEW` of the server's time its nonce is remembered; older or younger ones are refused, and so
are those of another epoch, which is another start of the server: what it remembered before is gone, so nothing from before is
taken. `now` must never go back; the epoch and the time are told to a device that is refused, and it repeats.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from edge_sdk.errors import WireError
from edge_sdk.identity import Claim

SKEW = 300.0  # seconds that a device's clock may be wrong
MOST = 4096  # nonces kept of a device: seven requests a second for as long as they are kept
KEY = 32  # bytes of a device's id


@dataclass
class Gate:
    """Remembers the nonces that could still come again, and until when.

    Args:
        epoch: 16 hex digits, unlike every other start's.
    """

    epoch: str
    _until: OrderedDict[bytes, float] = field(default_factory=OrderedDict)  # in the order they came, so also of their ends
    _ends: dict[str, deque[float]] = field(default_factory=dict)  # the same ends, of each device

    def __len__(self) -> int:
        """Nonces that are remembered."""
        return len(self._until)

    def check_time(self, claim: Claim, now: float) -> None:
        """Raises: WireError: `wrong-time`: signed for another start of the server, or too long ago or ahead."""
        if claim.epoch != self.epoch:
            raise WireError("wrong-time", "signed for another start of this server; take epoch and time from this answer", 401)
        if abs(claim.time - now) > SKEW:
            off = f"{abs(claim.time - now):.0f} seconds {'ahead' if claim.time > now else 'behind'}"
            raise WireError("wrong-time", f"the device's clock is {off}; take epoch and time from this answer", 401)

    def take(self, claim: Claim, now: float) -> None:
        """Remembers a claim that is verified and of a known device.

        Raises:
            WireError: `replayed`: it was taken before; `too-many`: this device sends more than can be remembered.
        """
        while self._until and next(iter(self._until.values())) < now:
            gone = self._until.popitem(last=False)[0][:KEY].hex()
            self._ends[gone].popleft()
            if not self._ends[gone]:
                del self._ends[gone]
        request = bytes.fromhex(claim.device + claim.nonce)
        if request in self._until:
            raise WireError("replayed", "this very request was taken before; sign another one", 401)
        ends = self._ends.get(claim.device, deque())
        if len(ends) >= MOST:
            over = math.floor(ends[0] - now) + 1.0  # whole seconds, after which the first is forgotten
            raise WireError("too-many", f"a device may send {MOST} requests in {2 * SKEW:.0f} seconds", 429, over)
        self._until[request] = end = now + 2 * SKEW  # signed at most SKEW ahead of now, it is too old SKEW after that
        self._ends.setdefault(claim.device, ends).append(end)
