"""How often a device may ask, and when those that wait come again; pure.

A device's quota is a bucket of tokens, one for each question, as many as it may ask in a minute. What is kept of it is the time
at which it is full again: one number a device.
"""

from __future__ import annotations

from edge_sdk.errors import WireError

MINUTE = 60.0
QUESTIONS = 60  # a minute
ROUNDING = 1e-3  # seconds
SHORTEST = 1.0  # seconds that a device waits for a place


def quota(wait_seconds: float) -> float:
    """Questions a minute: `QUESTIONS`, or four times what a device asks that comes whenever it was told to, if that is more."""
    return max(QUESTIONS, 4 * MINUTE / wait_seconds)


def ask(full: float, a_minute: float, now: float) -> float:
    """Takes a token.

    Args:
        full: when the bucket is full again; any time that is over for a device that is new.

    Returns:
        The same after this question.

    Raises:
        WireError: `too-often`: none is left.
    """
    was_set_back = full > now + MINUTE + ROUNDING  # the clock: a bucket is never further from full than a minute
    after = (now if was_set_back else max(full, now)) + MINUTE / a_minute
    if (early := after - now - MINUTE) > ROUNDING:  # seconds until a token is back
        raise WireError("too-often", f"a device may ask {a_minute:.0f} times a minute; wait as long as it was told", 429, early)
    return after


def spread(seconds: float, jitter: float) -> float:
    """A pause of about `seconds`, for a `jitter` uniform in [0, 1): 0.5 to 1.5 times as long.

    The mean stays. Devices that were told to wait at one moment come back over a span as long as the pause itself, which is as
    far apart as they can be.
    """
    return seconds * (0.5 + jitter)


def until_free(seconds: float, wait_seconds: float) -> float:
    """How long a device waits for a place that is free in `seconds` at the latest: somebody may answer before."""
    return min(max(seconds, SHORTEST), wait_seconds)
