"""Who works on which version, and until when: how many devices train at once; pure.

A device that is handed training has a lease. Its answer ends it, or the deadline, or newer versions for which what it makes would
come too late; a device that asks again keeps the one it has. A lease only decides who may begin: an update counts by the rules of
`coordinator.py`, with or without one, so these need not be on disk, and a restart forgets them.

The limit is the concurrency of PAPAYA (Huba et al. 2022). By Little's law an update is concurrency / buffer size versions old on
average, however many devices there are.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Lease:
    """A device works on `version` until `until`, on the clock of `Leases.take`."""

    version: int
    until: float


@dataclass
class Leases:
    """All that hold; `take` forgets those that are over.

    Args:
        seconds: how long one lasts.
        concurrency: how many there may be at once; 0 for no limit.
    """

    seconds: float
    concurrency: int = 0
    _held: OrderedDict[str, Lease] = field(default_factory=OrderedDict)  # in the order they were taken, so also of their ends

    def __len__(self) -> int:
        """Devices that work, as far as is known."""
        return len(self._held)

    def hold(self, now: float) -> int:
        """How many are not over."""
        return sum(now < lease.until for lease in self._held.values())

    def take(self, device: str, version: int, oldest: int, now: float) -> float:
        """Gives a device a lease on `version`, the newest, if there is room or it has one anyway.

        Args:
            oldest: the oldest version from which an update is still taken.

        Returns:
            0 where it may work; else seconds until the first of the others' leases ends, if nobody answers before.
        """
        while self._held and ((first := next(iter(self._held.values()))).until <= now or first.version < oldest):
            self._held.popitem(last=False)
        held = self._held.get(device)
        if held is not None and held.version == version:
            return 0.0
        if held is None and 0 < self.concurrency <= len(self._held):
            return next(iter(self._held.values())).until - now
        self._held[device] = Lease(version, now + self.seconds)
        self._held.move_to_end(device)
        return 0.0

    def end(self, device: str, version: int) -> None:
        """The device has answered `version`; a lease on a newer one holds."""
        if (held := self._held.get(device)) is not None and held.version <= version:
            del self._held[device]
