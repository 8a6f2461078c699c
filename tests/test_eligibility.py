"""When a device may work: each rule at its edge."""

from __future__ import annotations

from typing import Any

import pytest

from edge_sdk.eligibility import Conditions, Go, NotNow, Policy, decide
from edge_sdk.errors import SettingsError

FINE = Conditions(battery=0.9, charging=False, celsius=40.0, load=0.5, free_mb=1000.0)


def test_a_device_that_cannot_tell_may_work() -> None:
    """What is unknown never stands in the way."""
    assert decide(Conditions(), Policy(max_load=0.1)) == Go()


def test_a_device_in_order_may_work() -> None:
    """Everything within its limits: go."""
    assert decide(FINE, Policy(max_load=0.5)) == Go()


@pytest.mark.parametrize(
    ("now", "policy", "reason"),
    [
        (Conditions(battery=0.29), Policy(), "battery at 29%, below 30% and not charging"),
        (Conditions(battery=0.3), Policy(), None),
        (Conditions(battery=0.01, charging=True), Policy(), None),
        (Conditions(celsius=80.1), Policy(), "80 degrees, above 80"),
        (Conditions(celsius=80.0), Policy(), None),
        (Conditions(free_mb=63.0), Policy(), "63 MB of memory free, below 64"),
        (Conditions(free_mb=64.0), Policy(), None),
        (Conditions(load=9.0), Policy(), None),
        (Conditions(load=1.1), Policy(max_load=1.0), "load 1.1 a core, above 1.0"),
        (Conditions(load=1.0), Policy(max_load=1.0), None),
    ],
)
def test_each_rule_at_its_edge(now: Conditions, policy: Policy, reason: str | None) -> None:
    """At the limit it goes on, beyond it waits, and says why in numbers."""
    assert decide(now, policy) == (Go() if reason is None else NotNow(reason, 60.0))


def test_the_first_reason_is_told_and_the_policy_says_how_long() -> None:
    """Battery before heat before memory before load."""
    bad = Conditions(battery=0.0, charging=False, celsius=99.0, load=9.0, free_mb=0.0)
    verdict = decide(bad, Policy(max_load=1.0, wait_seconds=5.0))

    assert isinstance(verdict, NotNow)
    assert verdict.reason.startswith("battery")
    assert verdict.seconds == 5.0


@pytest.mark.parametrize(
    "change",
    [
        *({"min_battery": 1.1}, {"min_battery": -0.1}, {"max_load": -1.0}, {"min_free_mb": -1.0}, {"wait_seconds": 0.0}),
        {"wait_seconds": 1e9},
        *({name: float("nan")} for name in ("min_battery", "max_celsius", "max_load", "min_free_mb", "wait_seconds")),
    ],
)
def test_settings_out_of_bounds_are_refused(change: dict[str, Any]) -> None:
    """Each bound is checked when a policy is made."""
    with pytest.raises(SettingsError):
        Policy(**change)
