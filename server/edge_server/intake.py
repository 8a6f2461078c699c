"""How many bytes of bodies may be on their way into the server at once; pure.

Room is taken by bytes that have arrived, not by those that were promised, which cost a stranger nothing; it is given back when
the request is over, however it ends. A body that could not fit is refused before a byte of it is read, one that no longer fits
where it is, and the device is asked to come again. So the memory and the disk that unfinished uploads take are bounded, however
many devices there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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

    @contextmanager
    def room(self, promised: int) -> Iterator[Callable[[int], None]]:
        """For a body of `promised` bytes; call what it gives with the number of bytes before each part of it is kept.

        Raises:
            WireError: `busy`: there is no room, now or at one of the parts.
        """
        self._check(promised)
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            self._check(size)
            self.held += size
            taken += size

        try:
            yield take
        finally:
            self.held -= taken

    def _check(self, size: int) -> None:
        if self.held + size > self.limit:
            raise WireError("busy", "the server is receiving as much as it can hold; try again later", 503, RETRY_SECONDS)
