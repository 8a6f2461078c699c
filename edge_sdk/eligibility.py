"""May the device do heavy work now? `decide(conditions, policy) -> Go | NotNow(reason, seconds)`; `conditions.py` looks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from edge_sdk.errors import SettingsError


@dataclass(frozen=True)
class Conditions:
    """How the device is; None where it cannot tell, which never stands in the way.

    Args:
        battery: charge between 0 and 1.
        charging: whether it hangs on a charger.
        celsius: of the hottest part.
        load: runnable processes for each core, over the last minute.
        free_mb: memory that could be had.
    """

    battery: float | None = None
    charging: bool | None = None
    celsius: float | None = None
    load: float | None = None
    free_mb: float | None = None


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When training may go on; asked before every small step.

    Args:
        min_battery: charge below which it waits, unless the device is charging.
        max_celsius: temperature above which it waits.
        max_load: load of a core above which it waits; the training itself counts for `threads / cores`. 0 for any load.
        min_free_mb: memory that must be free.
        wait_seconds: how long it waits before it looks again.
    """

    min_battery: float = 0.3
    max_celsius: float = 80.0
    max_load: float = 0.0
    min_free_mb: float = 64.0
    wait_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_battery <= 1 or not self.max_load >= 0 or not self.min_free_mb >= 0 or math.isnan(self.max_celsius):
            raise SettingsError("min_battery must be from 0 to 1, max_load and min_free_mb not negative, max_celsius a number")
        if not 0 < self.wait_seconds <= 86_400:
            raise SettingsError("wait_seconds must be between 0 and 86400")


@dataclass(frozen=True)
class Go:
    """Nothing stands in the way."""


@dataclass(frozen=True)
class NotNow:
    """Wait, then look again after `seconds`."""

    reason: str
    seconds: float


def decide(now: Conditions, policy: Policy) -> Go | NotNow:
    """The first thing that stands in the way, in the order battery, heat, memory, load."""
    if now.battery is not None and now.battery < policy.min_battery and not now.charging:
        return NotNow(f"battery at {now.battery:.0%}, below {policy.min_battery:.0%} and not charging", policy.wait_seconds)
    if now.celsius is not None and now.celsius > policy.max_celsius:
        return NotNow(f"{now.celsius:.0f} degrees, above {policy.max_celsius:.0f}", policy.wait_seconds)
    if now.free_mb is not None and now.free_mb < policy.min_free_mb:
        return NotNow(f"{now.free_mb:.0f} MB of memory free, below {policy.min_free_mb:.0f}", policy.wait_seconds)
    if policy.max_load and now.load is not None and now.load > policy.max_load:
        return NotNow(f"load {now.load:.1f} a core, above {policy.max_load:.1f}", policy.wait_seconds)
    return Go()
