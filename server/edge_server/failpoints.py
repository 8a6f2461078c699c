"""Points beside every write at which a test has the server killed; nothing happens where nobody asks for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from edge_sdk.errors import SettingsError

GUARDED = (  # where devices need tokens
    "admin-written",
    "admission-written",  # the transaction is open
    "admission-committed",  # the token is used, and the run knows nothing of the device
)
POINTS = (
    "run-named",  # the database has the run's id, the folder does not yet
    "run-written",  # it has, and no version
    *GUARDED,
    "upload-arriving",  # a part of it is in a file that nothing names
    "blob-synced",  # its bytes are on disk under a name of their own
    "blob-renamed",  # it has its name, which a power cut may still take away
    "event-written",  # the transaction is open
    "event-committed",  # and nobody has been told
    "version-file-written",  # one of its folder's two
    "version-written",  # the folder is there, its event is not
    "snapshot-written",  # the transaction is open
    "snapshot-committed",
)
Reached = Callable[[str], None]


def nothing(point: str) -> None:
    """Goes on."""


def of(text: str | None) -> Reached:
    """Kills this process when it reaches a point for the nth time; `nothing` where `text` is None.

    Args:
        text: `POINT:N`, what the environment says as EDGE_FAILPOINT.

    Raises:
        SettingsError: there is no such point, or N is no count.
    """
    if text is None:
        return nothing
    at, _, count = text.partition(":")
    if at not in POINTS or not (count.isascii() and count.isdigit() and int(count)):
        raise SettingsError(f"EDGE_FAILPOINT is POINT:N with one of {', '.join(POINTS)}, not {text!r}; unset it")
    left = iter(range(int(count) - 1, -1, -1))

    def reached(point: str) -> None:
        if point == at and next(left, None) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return reached
