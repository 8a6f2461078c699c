"""How many bytes of bodies may be on their way into the server at once; pure.

Room is taken by bytes that have arrived, not by those that were promised, which cost a stranger nothing; it is given back when
the request is over, however it ends. A body that could not fit is refused before a byte of it is read, one that no longer fits
where it is, and the device is asked to come again. So the memory and the disk that unfinished uploads take are bounded, however
many devices there are; and what one of them may take of it is, so that none keeps the others out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from edge_sdk.errors import WireError

LIMIT = 256_000_000  # bytes
RETRY_SECONDS = 1.0  # the device's own pause doubles, and is spread


@dataclass
class Intake:
    """Counts the bytes that are there.

    Args:
        limit: most bytes at once.
    """

    limit: int = LIMIT
    held: int = 0
    _of: dict[str, int] = field(default_factory=dict)  # bytes of each device that has some there

    @contextmanager
    def room(self, promised: int, device: str | None = None, most: int = LIMIT) -> Iterator[Callable[[int], None]]:
        """For a body of `promised` bytes; call what it gives with the number of bytes before each part of it is kept.

        Args:
            device: who sends it, None where nobody knows. most: bytes that it may have there at once, in all its requests.

        Raises:
            WireError: `busy`: there is no room, now or at one of the parts; `too-many`: the device has too much there already.
        """
        self._check(promised, device, most)
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            self._check(size, device, most)
            self._add(size, device)
            taken += size

        try:
            yield take
        finally:
            self._add(-taken, device)

    def _add(self, size: int, device: str | None) -> None:
        self.held += size
        if device is not None:
            self._of[device] = self._of.get(device, 0) + size
            if not self._of[device]:
                del self._of[device]

    def _check(self, size: int, device: str | None, most: int) -> None:
        if device is not None and self._of.get(device, 0) + size > most:
            raise WireError("too-many", f"a device may have {most} bytes on their way at once", 429, RETRY_SECONDS)
        if self.held + size > self.limit:
            raise WireError("busy", "the server is receiving as much as it can hold; try again later", 503, RETRY_SECONDS)
