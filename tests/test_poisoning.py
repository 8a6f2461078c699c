"""What hostile devices cost in accuracy, by rule, in a small task that is learned by the product's own step and averages.

Devices have texts of their own, embedded as MiniLM embeds them: unit vectors in 384 dimensions. The task is made up here, so the
numbers say how rules compare, and not what a model would lose. What docs/server.md says of it is what is measured here.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from bench.async_vs_sync import SPEC, Texts, fit, scores
from edge_sdk.adapters import Array, Arrays, subtract
from edge_sdk.tasks import accuracy
from edge_sdk.training.batches import Training
from edge_server import robust
from edge_server.aggregation import Contribution
from edge_server.robust import Krum, Mean, Median, NormBounded, Rule, TrimmedMean
from edge_server.systems import lpfl
from edge_server.systems.lpfl import LpFl

ROUNDS, SEEDS = 16, (0, 1, 2)
LABELS = 200  # of a device
TRAINING = Training(steps=4, batch_size=16, learning_rate=0.003)
FEW = 4.0  # points
PAGE = Path(__file__).parent.parent / "docs/server.md"
FLEETS = ((4, 1), (9, 2))  # devices, and how many of them attack
CLAIM = 10_000_000  # examples, the most that a message may say


@dataclass(frozen=True)
class Attack:
    """`sends` makes an update of the honest ones, which it knows, and its own; `claims`: how many examples it says it has."""

    sends: Callable[[Sequence[Arrays], Arrays], dict[str, Array]]
    claims: int = LABELS


# Attacks --------------------------------------------------------------------------------------------------------------
def mean(updates: Sequence[Arrays]) -> dict[str, Array]:
    return {name: np.mean([update[name] for update in updates], axis=0, dtype=np.float32) for name in updates[0]}


def scaled(update: Arrays, by: float) -> dict[str, Array]:
    return {name: np.asarray(array * np.float32(by), np.float32) for name, array in update.items()}


def a_little(updates: Sequence[Arrays], _: Arrays) -> dict[str, Array]:
    """One and a half deviations below the honest mean in every number: Baruch et al. 2019, "A Little Is Enough", section 3."""
    centre = mean(updates)
    return {name: np.asarray(centre[name] - 1.5 * np.std([u[name] for u in updates], axis=0), np.float32) for name in centre}


ATTACKS: dict[str, Attack] = {
    "none": Attack(lambda _, own: dict(own)),
    "norm x 1e6": Attack(lambda _, own: scaled(own, 1e6)),
    "sign flipped": Attack(lambda _, own: scaled(own, -1)),
    "sign flipped, x 10": Attack(lambda _, own: scaled(own, -10)),
    "all alike, against the mean": Attack(lambda honest, _: scaled(mean(honest), -10)),
    "a little is enough": Attack(a_little),
    "sign flipped, claims 10,000,000 examples": Attack(lambda _, own: scaled(own, -1), CLAIM),
    "sign flipped, x 10, claims 10,000,000 examples": Attack(lambda _, own: scaled(own, -10), CLAIM),
}


# The task -------------------------------------------------------------------------------------------------------------
def texts(count: int, rng: np.random.Generator) -> Texts:
    """Unit vectors; 24 of their 384 numbers say which class they are of, none of them much."""
    y = rng.integers(0, 2, count)
    x = rng.normal(size=(count, 384))
    x[:, :24] += 0.42 * (2 * y[:, None] - 1)
    return Texts((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), y)


@cache
def learned(
    devices: int, hostile: int, attack: str, rule: Rule, clip: float = LpFl().clip_norm, labels: tuple[int, ...] = ()
) -> float:
    """Mean accuracy (percent) over three seeds after 16 synchronous versions; the first `hostile` devices attack.

    Args:
        labels: of each device; as many everywhere, if none are given.
    """
    labels = labels or (LABELS,) * devices
    settings = LpFl(buffer_size=devices, training=TRAINING, server_lr=4.0, rule=rule, clip_norm=clip)
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        own, test = [texts(count, rng) for count in labels], texts(2000, rng)
        adapter: Arrays = SPEC.start(seed)
        for version in range(ROUNDS):
            chance = [np.random.default_rng((seed, version, k)) for k in range(devices)]
            deltas = [subtract(fit(adapter, own[k], TRAINING, chance[k])[0], adapter) for k in range(devices)]
            how, honest = ATTACKS[attack], deltas[hostile:]
            buffer = [Contribution(how.sends(honest, each), how.claims, 0, adapter) for each in deltas[:hostile]]
            buffer += [Contribution(each, count, 0, adapter) for each, count in zip(honest, labels[hostile:], strict=True)]
            adapter = lpfl.step(settings, SPEC, adapter, buffer)
        found.append(100 * accuracy(scores(adapter, test.x), test.y.tolist()))
    return statistics.fmean(found)


def rules(hostile: int, devices: int) -> dict[str, Rule]:
    """By the names they have in the table; Krum takes more than four devices."""
    found: dict[str, Rule] = {
        "mean": Mean(),
        "norm_bounded": NormBounded(),
        "median": Median(),
        "trimmed_mean": TrimmedMean(hostile),
        "krum": Krum(hostile, max(devices - hostile - 2, 1)),
    }
    return {name: rule for name, rule in found.items() if robust.fewest(rule) <= devices}


CELLS = [(n, f, attack, name) for n, f in FLEETS for attack in ATTACKS for name in rules(f, n)]


@cache
def documented() -> Mapping[tuple[int, int, str, str], float]:
    """The table of docs/server.md; a cell is (devices, hostile, attack, rule)."""
    rows = [[cell.strip(" `*") for cell in row.strip("|").split("|")] for row in PAGE.read_text().splitlines() if row[:1] == "|"]
    start = next(i for i, row in enumerate(rows) if row[0] == "hostile")
    found = {}
    for first, attack, *numbers in rows[start + 2 : start + 2 + len(FLEETS) * len(ATTACKS)]:
        hostile, devices = (int(number) for number in re.findall(r"\d+", first))
        for name, number in zip(rows[start][2:], numbers, strict=True):
            if number != "-":
                found[devices, hostile, attack, name] = float(number)
    return found


# What is claimed ------------------------------------------------------------------------------------------------------
def test_the_table_has_every_cell() -> None:
    """All attacks, all rules that a fleet is large enough for, and nothing else."""
    assert sorted(documented()) == sorted(CELLS)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "hostile"), FLEETS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_an_attack_costs_is_documented(devices: int, hostile: int, attack: str) -> None:
    """Each rule's accuracy is that of the table, to a point and a half: another machine adds in another order."""
    found = {name: learned(devices, hostile, attack, rule) for name, rule in rules(hostile, devices).items()}

    assert found == pytest.approx({name: documented()[devices, hostile, attack, name] for name in found}, abs=1.5)


@pytest.mark.parametrize("name", ["norm_bounded", "median", "trimmed_mean", "krum"])
@pytest.mark.parametrize("attack", list(ATTACKS)[1:])
def test_a_rule_that_was_chosen_keeps_two_of_nine_within_a_few_points(name: str, attack: str) -> None:
    """Of what the mean of honest devices reaches; this is said of the table, whose numbers the slow tests measure."""
    assert documented()[9, 2, attack, name] > documented()[9, 2, "none", "mean"] - FEW


def test_the_default_keeps_one_of_four_and_two_of_nine_within_ten_points() -> None:
    """Whatever of this they send and claim; it is said of the table, whose numbers the slow tests measure."""
    for devices, hostile in FLEETS:
        worst = min(documented()[devices, hostile, attack, "mean"] for attack in ATTACKS)
        assert worst > documented()[devices, hostile, "none", "mean"] - 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "hostile", "attack", "clip", "documented"),
    [
        (4, 1, "all alike, against the mean", 3.0, 6.0),
        (9, 2, "all alike, against the mean", 1.5, 47.8),
        (4, 1, "sign flipped, claims 10,000,000 examples", 0.0, 11.1),
    ],
)
def test_a_more_generous_bound_is_undone(devices: int, hostile: int, attack: str, clip: float, documented: float) -> None:
    """The three numbers that docs/server.md has beside the table."""
    assert learned(devices, hostile, attack, Mean(), clip) == pytest.approx(documented, abs=1.5)
    assert re.search(rf"\sends?\s+at\s+{documented}\b", PAGE.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("labels", "held", "free"), [((16, 16, 16, 400), 89.5, 94.9), ((50, 100, 200, 400), 95.5, 95.6)])
def test_what_the_bound_on_claims_costs_honest_devices_is_documented(labels: tuple[int, ...], held: float, free: float) -> None:
    """By default, and weighted by all they have."""
    found = [learned(len(labels), 0, "none", Mean(), clip, labels) for clip in (LpFl().clip_norm, 0.0)]

    assert found == pytest.approx([held, free], abs=1.5)
    assert all(re.search(rf"\bat\s+{number}\b|\band\s+{number}\b", PAGE.read_text()) for number in (held, free))
