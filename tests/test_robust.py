"""Rules against hostile updates: by hand, for any honest majority, and in a step of LP-FL under attack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_sdk.adapters import AdapterSpec, Array, Arrays, Slot, add, subtract, take
from edge_sdk.errors import DataError, SettingsError
from edge_server import robust
from edge_server.aggregation import Contribution, fedbuff, products
from edge_server.robust import Krum, Mean, Median, NormBounded, Rule, TrimmedMean
from edge_server.systems import lpfl
from edge_server.systems.lpfl import LpFl
from tests import strategies

SLOTS = (Slot("layer.0.query", 6, 5), Slot("layer.1.query", 6, 4))
SPEC = AdapterSpec(SLOTS, rank=2, alpha=4.0)
Matrix = NDArray[np.float64]

small = st.integers(-1000, 1000).map(float)
anything = st.floats(width=32, allow_nan=False, allow_infinity=False)


def row(*values: float, examples: int = 1, staleness: int = 0) -> Contribution:
    return Contribution({"w": np.array(values, np.float32)}, examples, staleness)


def values(update: Contribution) -> list[float]:
    return [float(value) for value in update.delta["w"]]


def random(seed: int, size: float = 1.0, spec: AdapterSpec = SPEC) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, size, shape).astype(np.float32) for name, shape in spec.shapes().items()}


def update(seed: int, base: Arrays, size: float = 1.0, **rest: Any) -> Contribution:
    return Contribution(random(seed, size), rest.get("examples", 1), rest.get("staleness", 0), base)


def done(update: Contribution, slot: Slot) -> Matrix:
    """(B + dB)(A + dA) - BA, as a whole matrix."""
    assert update.base is not None
    start = {name: array.astype(np.float64) for name, array in take(update.base, SPEC).items()}
    moved = {name: array + update.delta.get(name, 0.0) for name, array in start.items()}
    return np.asarray(moved[slot.b] @ moved[slot.a] - start[slot.b] @ start[slot.a])


# Size -----------------------------------------------------------------------------------------------------------------
def test_the_norm_is_of_all_numbers() -> None:
    """Over all arrays, and in float64: no finite update has an infinite norm."""
    assert robust.norm({"a": np.array([[1, 2]], np.float32), "b": np.array([[2], [4]], np.float32)}) == 5.0
    assert robust.norm({"w": np.full(4, 3e38, np.float32)}) == pytest.approx(6e38)


def test_clipping_by_hand() -> None:
    """(3, 4) has the norm 5: at most 2.5 of it is half of it; what is short enough is the same object."""
    long = row(3, 4, examples=7, staleness=2)

    assert values(robust.clip(long, 2.5)) == [1.5, 2.0]
    assert (robust.clip(long, 2.5).num_examples, robust.clip(long, 2.5).staleness) == (7, 2)
    assert robust.clip(long, 5.0) is long
    assert values(robust.clip(row(0, 0), 0.0)) == [0.0, 0.0]


@given(st.lists(anything, min_size=1, max_size=6), st.floats(1e-3, 1e30))
def test_a_clipped_update_is_short_and_keeps_its_direction(numbers: list[float], limit: float) -> None:
    """Whatever size it had."""
    clipped = robust.clip(row(*numbers), limit)

    assert robust.norm(clipped.delta) <= limit * (1 + 1e-5)
    assert all(a * b >= 0 for a, b in zip(numbers, values(clipped), strict=True))


def test_a_size_is_measured_against_the_median() -> None:
    """Of 1, 2, 4 and 1000 the median is 3: twice this is 6, and only the last is cut."""
    buffer = [row(1.0), row(-1000.0), row(4.0), row(2.0)]

    assert [values(c) for c in robust.bounded(buffer, 2.0)] == [[1.0], [-6.0], [4.0], [2.0]]


def test_two_updates_are_left_alone() -> None:
    """Of two nobody can tell which is too large."""
    buffer = [row(1.0), row(1000.0)]

    assert robust.bounded(buffer, 1.0) == buffer


def test_a_claim_is_held_to_the_median() -> None:
    """Of 3, 8, 10 and ten million examples the median is 9: more count as 9, fewer as they are."""
    buffer = [row(1.0, examples=n, staleness=n % 4) for n in (10_000_000, 8, 3, 10)]
    held = robust.bounded(buffer, 1.25)

    assert [(c.num_examples, c.staleness) for c in held] == [(9, 0), (8, 0), (3, 3), (9, 2)]
    assert held[1] is buffer[1]


def test_among_three_nobody_weighs_more_than_the_second() -> None:
    """The exact mean: a claim of ten million beside 4 and 2 counts as 4; of two updates it counts as it is."""
    buffer = [row(1.0, examples=10_000_000), row(-1.0, examples=4), row(1.0, examples=2)]
    new = lpfl.step(LpFl(), SPEC, {"w": np.zeros(1, np.float32)}, buffer)

    assert float(new["w"][0]) == float(np.float32((4 - 4 + 2) / 10))
    assert robust.bounded(buffer[:2], 1.25) == buffer[:2]


@given(st.lists(st.integers(1, 10_000_000), min_size=3, max_size=9))
def test_no_claim_buys_more_than_two_nths_of_the_weight(claims: list[int]) -> None:
    """Half of the updates weigh the same, whatever n devices claim; equal claims stay as they are."""
    held = [c.num_examples for c in robust.bounded([row(1.0, examples=n) for n in claims], 1.25)]

    assert 2 * sum(held) >= len(held) * max(held)
    assert all(0 < new <= old for new, old in zip(held, claims, strict=True))
    assert min(claims) < max(claims) or held == claims


@pytest.mark.parametrize("rule", [NormBounded(), NormBounded(norm=100.0)])
@pytest.mark.parametrize("clip", [0.0, 1.25])
def test_norm_bounded_counts_each_update_once(rule: Rule, clip: float) -> None:
    """Whatever it claims; what is three versions old counts half: (1 + 1 - 1 / 2) / 2.5."""
    buffer = [row(1.0, examples=3), row(1.0, examples=5000), row(-1.0, examples=10_000_000, staleness=3)]
    new = lpfl.step(LpFl(rule=rule, clip_norm=clip), SPEC, {"w": np.zeros(1, np.float32)}, buffer)

    assert float(new["w"][0]) == float(np.float32(0.6))


def test_a_device_that_trained_less_is_measured_by_the_same_rule() -> None:
    """Sizes are per number: one layer moved as far as others move two is not cut, and is held to the same size."""
    base = random(1)
    top = SPEC.part(1, 2)
    less = Contribution({name: np.ones(shape, np.float32) for name, shape in top.shapes().items()}, 1, 0, base)
    whole = [Contribution({name: np.ones(shape, np.float32) for name, shape in SPEC.shapes().items()}, 1, 0, base)] * 2
    far = replace(less, delta={name: 10 * array for name, array in less.delta.items()})

    assert robust.bounded([*whole, less], 1.0)[2] is less
    for array in robust.bounded([*whole, far], 1.0)[2].delta.values():
        np.testing.assert_allclose(array, 1.0, rtol=1e-6)


# Number by number -----------------------------------------------------------------------------------------------------
def test_the_median_by_hand() -> None:
    """Of three the middle one, of four the mean of the middle two; each number for itself, examples and age do not count."""
    three = [row(1, 9, examples=500), row(2, 7), row(90, 8, staleness=8)]

    assert values(robust.median(three)) == [2.0, 8.0]
    assert values(robust.median([*three, row(4, -5)])) == [3.0, 7.5]


def test_the_trimmed_mean_by_hand() -> None:
    """Without the smallest and the largest of each number: (2 + 4) / 2 and (7 + 8) / 2."""
    buffer = [row(1, 9, examples=500), row(2, 7), row(90, 8), row(4, -5)]

    assert values(robust.trimmed_mean(buffer, 1)) == [3.0, 7.5]
    assert values(robust.trimmed_mean([*buffer, row(6, 0)], 2)) == [4.0, 7.0]


@st.composite
def attacked(draw: st.DrawFn) -> tuple[list[Contribution], list[Contribution], int]:
    """Honest updates, fewer hostile ones with any finite numbers, and how many those are."""
    byzantine = draw(st.integers(1, 3))
    honest = draw(st.lists(st.tuples(small, small), min_size=byzantine + 1, max_size=6))
    hostile = draw(st.lists(st.tuples(anything, anything), min_size=byzantine, max_size=byzantine))
    return [row(*pair) for pair in honest], [row(*pair, examples=10_000) for pair in hostile], byzantine


@given(st.data(), attacked())
def test_a_minority_cannot_leave_the_honest_range(data: st.DataObject, fleet: tuple[list[Any], list[Any], int]) -> None:
    """Whatever a minority sends, every number stays between honest ones; and the order of arrival does not matter."""
    honest, hostile, byzantine = fleet
    shuffled = data.draw(st.permutations([*honest, *hostile]))

    for result in (robust.median(shuffled), robust.trimmed_mean(shuffled, byzantine)):
        for i, value in enumerate(values(result)):
            assert min(values(c)[i] for c in honest) <= value <= max(values(c)[i] for c in honest)
    assert values(robust.median(shuffled)) == values(robust.median([*honest, *hostile]))
    assert values(robust.trimmed_mean(shuffled, byzantine)) == values(robust.trimmed_mean([*honest, *hostile], byzantine))


def test_a_mean_of_large_numbers_is_finite() -> None:
    """The middle two near float32's end have a mean."""
    buffer = [row(3e38), row(3.2e38), row(0), row(3.4e38)]

    assert values(robust.median(buffer)) == [float(np.float32(3.1e38))]
    assert values(robust.trimmed_mean(buffer, 1)) == [float(np.float32(3.1e38))]


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(1), Krum(1)])
def test_parts_are_not_compared_number_by_number(rule: Rule) -> None:
    """Updates of different layers or ranks, or none at all, are refused."""
    base = random(1)
    parts = [Contribution(random(i, 1.0, SPEC.part(1 + i % 2, 2)), 1, 0, base) for i in range(5)]

    with pytest.raises(DataError, match="different parts"):
        robust.apply(rule, parts, SPEC)
    with pytest.raises(DataError):
        robust.apply(rule, [], SPEC)


# Krum -----------------------------------------------------------------------------------------------------------------
@given(st.integers(0, 1000), st.integers(2, 6), st.booleans())
def test_distances_are_those_of_whole_matrices(seed: int, n: int, frozen: bool) -> None:
    """The small Gram matrices give what the (out, in) matrices give, for updates of different bases and of B alone."""
    buffer = [update(seed + i, random(seed + 100 + i % 2)) for i in range(n)]
    if frozen:
        buffer = [replace(c, delta={slot.b: c.delta[slot.b] for slot in SLOTS}) for c in buffer]
    expected = [[sum(np.square(done(a, s) - done(b, s)).sum() for s in SLOTS) for b in buffer] for a in buffer]

    np.testing.assert_allclose(robust.distances(buffer, SPEC), expected, rtol=1e-5, atol=1e-5)


def test_updates_that_do_the_same_are_no_distance_apart() -> None:
    """Factors that are turned are other numbers, and the same update: the reason to measure products."""
    base = random(1)
    trained = add(base, random(2))
    turn = np.array([[0, 1], [-1, 0]], np.float32)
    turned = {
        **{slot.a: turn.T @ trained[slot.a] for slot in SLOTS},
        **{slot.b: trained[slot.b] @ turn for slot in SLOTS},
    }
    buffer = [Contribution(subtract(arrays, base), 1, 0, base) for arrays in (trained, turned)]

    assert robust.norm(subtract(buffer[0].delta, buffer[1].delta)) > 1
    np.testing.assert_allclose(robust.distances(buffer, SPEC), 0.0, atol=1e-4)


ONE = AdapterSpec((Slot("layer.0.query", 1, 1),), 1, 1.0)


def scalar(value: float) -> Contribution:
    """An update of `ONE` that does `value`: A is 1 and stays."""
    (slot,) = ONE.slots
    base = {slot.a: np.ones((1, 1), np.float32), slot.b: np.zeros((1, 1), np.float32)}
    return Contribution({slot.a: np.zeros((1, 1), np.float32), slot.b: np.full((1, 1), value, np.float32)}, 9, 3, base)


def did(update: Contribution) -> float:
    return float(update.delta[ONE.slots[0].b][0, 0])


def test_krum_by_hand() -> None:
    """Of 0, 1, 3, 7 and 100, one of them hostile: the two nearest are 1 + 9, 1 + 4, 4 + 9, 16 + 36, ... away, so 1 is taken."""
    buffer = [scalar(value) for value in (100, 7, 3, 1, 0)]

    assert [did(c) for c in robust.krum(buffer, ONE, 1)] == [1.0]
    assert [did(c) for c in robust.krum(buffer, ONE, 1, keep=3)] == [1.0, 0.0, 3.0]
    assert {(c.num_examples, c.staleness) for c in robust.krum(buffer, ONE, 1, keep=3)} == {(1, 0)}


@given(st.data(), st.integers(1, 2), st.integers(0, 50))
def test_krum_keeps_to_those_who_agree(data: st.DataObject, byzantine: int, seed: int) -> None:
    """However large, however alike, and wherever in the buffer hostile updates are: those far from the honest are not kept."""
    base = random(seed)
    honest = [update(seed + 1 + i, base, 0.01) for i in range(byzantine + 3)]
    size = data.draw(st.sampled_from([10.0, 1e6, 1e30]))
    alike = data.draw(st.booleans())
    hostile = [update(seed + 50 + (0 if alike else i), base, size, examples=10_000) for i in range(byzantine)]
    shuffled = data.draw(st.permutations([*honest, *hostile]))
    keep = data.draw(st.integers(1, 3))
    kept = robust.krum(shuffled, SPEC, byzantine, keep)

    assert len(kept) == keep
    assert all(any(strategies.same(c.delta, h.delta) for h in honest) for c in kept)
    again = robust.krum([*honest, *hostile], SPEC, byzantine, keep)
    assert all(strategies.same(a.delta, b.delta) for a, b in zip(kept, again, strict=True))


def test_krum_needs_enough_updates_and_their_bases() -> None:
    """One hostile update takes five, and keeping more than are honest is refused."""
    buffer = [scalar(float(i)) for i in range(5)]

    with pytest.raises(DataError, match="with 5 or more, not 4"):
        robust.krum(buffer[:4], ONE, 1)
    with pytest.raises(DataError, match="with 6 or more, not 5"):
        robust.krum(buffer, ONE, 1, keep=5)
    with pytest.raises(DataError, match="no base"):
        robust.krum([replace(c, base=None) for c in buffer], ONE, 1)


# In a run -------------------------------------------------------------------------------------------------------------
BASE = random(1, 0.3)
COMMON = random(2, 0.01)
HONEST = [Contribution(add(COMMON, random(10 + i, 0.003)), 16, 0, BASE) for i in range(4)]
ATTACKS = {
    "huge": {name: np.full_like(array, 1e30) for name, array in COMMON.items()},
    "beyond float32": {name: np.full_like(array, 3e38) for name, array in COMMON.items()},
    "sign flipped, ten times": {name: -10 * array for name, array in COMMON.items()},
    "a hundred times": {name: 100 * array for name, array in COMMON.items()},
    "noise": random(99, 5.0),
}
SIZE = max(robust.norm(c.delta) for c in HONEST)
HOW_FAR = [  # of the honest mean, in sizes of the largest honest update; sizes differ by a few hundredths, directions by a third
    (LpFl(), 3, 1.05),  # a quarter of what is 3 long, and of the mean that it displaces
    (LpFl(rule=NormBounded()), 3, 0.55),  # a quarter of what is 1 long, and of the mean
    (LpFl(rule=NormBounded(norm=SIZE / 2)), 3, 0.8),  # honest ones are halved, too
    (LpFl(rule=Median()), 3, 0.3),
    (LpFl(rule=TrimmedMean()), 3, 0.3),
    (LpFl(rule=Krum(), buffer_size=5), 4, 0.4),
    (LpFl(rule=Krum(keep=3), buffer_size=5), 4, 0.3),
    (LpFl(rule=Krum(keep=3), buffer_size=5, average="products"), 4, 0.3),
    (LpFl(average="products"), 3, 1.05),
]


def effect(before: Arrays, after: Arrays) -> list[Matrix]:
    wide = [{name: array.astype(np.float64) for name, array in arrays.items()} for arrays in (before, after)]
    return [np.asarray(wide[1][s.b] @ wide[1][s.a] - wide[0][s.b] @ wide[0][s.a]) for s in SLOTS]


def apart(a: Sequence[Matrix], b: Sequence[Matrix] | None = None) -> float:
    return math.sqrt(sum(float(np.square(x - y).sum()) for x, y in zip(a, b or [np.zeros_like(x) for x in a], strict=True)))


def mean(settings: LpFl, buffer: Sequence[Contribution]) -> dict[str, Array]:
    return products(BASE, SPEC, buffer) if settings.average == "products" else fedbuff(BASE, buffer)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(("settings", "honest", "limit"), HOW_FAR)
def test_one_hostile_update_moves_a_version_only_so_far(settings: LpFl, honest: int, limit: float, attack: str) -> None:
    """Beside three or four honest ones, at most `limit` sizes of an honest update away from their mean, whatever it sends.

    Sizes and distances are those of what an update does, BA after and before.
    """
    buffer = [*HONEST[:honest], Contribution(ATTACKS[attack], 16, 0, BASE)]
    new = lpfl.step(settings, SPEC, BASE, buffer)
    size = max(apart(effect(BASE, add(BASE, c.delta))) for c in HONEST)
    best = effect(BASE, mean(settings, HONEST[:honest]))

    assert apart(effect(BASE, new), best) <= limit * size


def test_unclipped_the_same_attack_decides_the_version() -> None:
    """The reason for the default: without it one flipped update of four turns the mean around."""
    buffer = [*HONEST[:3], Contribution(ATTACKS["sign flipped, ten times"], 16, 0, BASE)]
    new = lpfl.step(LpFl(clip_norm=0), SPEC, BASE, buffer)

    assert sum(float(np.vdot(new[name] - BASE[name], COMMON[name])) for name in COMMON) < 0
    assert apart(effect(BASE, new), effect(BASE, fedbuff(BASE, HONEST[:3]))) > 2 * max(
        apart(effect(BASE, add(BASE, c.delta))) for c in HONEST
    )


@pytest.mark.parametrize("average", ["factors", "products"])
def test_honest_updates_are_averaged_as_ever(average: Any) -> None:
    """By default a buffer in which no size or claim is out of the ordinary makes the very bytes it made without the check."""
    settings = LpFl(average=average)
    buffer = [replace(c, num_examples=n, staleness=n % 3) for c, n in zip(HONEST, (3, 16, 16, 16), strict=True)]

    assert strategies.same(lpfl.step(settings, SPEC, BASE, buffer), mean(settings, buffer))


def test_a_rule_and_the_step_go_together() -> None:
    """server_lr scales what a rule left: the median of 1, 2 and 90, a half of it."""
    buffer = [row(1), row(2, examples=9), row(90)]
    new = lpfl.step(LpFl(server_lr=0.5, rule=Median(), clip_norm=0), SPEC, {"w": np.array([10.0], np.float32)}, buffer)

    assert float(new["w"][0]) == 11.0


# Settings -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rule", "size"),
    [(Mean(), 1), (NormBounded(1.0), 1), (NormBounded(), 3), (Median(), 3), (TrimmedMean(2), 5), (Krum(2, 3), 7)],
)
def test_a_rule_needs_a_buffer_of_its_size(rule: Rule, size: int) -> None:
    """Fewer updates than a rule can choose among are refused with the setting, before a run starts."""
    assert LpFl(buffer_size=size, rule=rule).rule == rule
    if size > 1:
        with pytest.raises(SettingsError, match=f"among {size} updates or more: lpfl.buffer_size is {size - 1}"):
            LpFl(buffer_size=size - 1, rule=rule)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TrimmedMean, {"byzantine": 0}),
        (Krum, {"byzantine": 0}),
        (Krum, {"keep": 0}),
        *((NormBounded, {"norm": value}) for value in (-1.0, math.nan, math.inf)),
    ],
)
def test_a_rule_out_of_bounds_is_refused(kind: Any, values: dict[str, Any]) -> None:
    """The message names the setting."""
    with pytest.raises(SettingsError, match=f"rule.{next(iter(values))}|rule.byzantine and rule.keep"):
        kind(**values)
