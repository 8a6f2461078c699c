"""Aggregating devices of different depth and rank: what BA becomes, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_sdk.adapters import AdapterSpec, Array, Arrays, Slot, add, subtract, take
from edge_sdk.errors import DataError
from edge_server.aggregation import Contribution, factors, fedbuff, products
from tests import strategies

SLOTS = tuple(Slot(f"layer.{i}.query", 12, 10) for i in range(3))
SPEC = AdapterSpec(SLOTS, rank=4, alpha=8.0)
ONE = AdapterSpec((Slot("layer.0.query", 1, 1),), 1, 1.0)
Product = NDArray[np.float64]


def random(spec: AdapterSpec, seed: int, size: float = 1.0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, size, shape).astype(np.float32) for name, shape in spec.shapes().items()}


def product(arrays: Arrays, slot: Slot, rank: int | None = None) -> Product:
    a, b = arrays[slot.a][:rank].astype(np.float64), arrays[slot.b][:, :rank].astype(np.float64)
    return np.asarray(b @ a)


def trained(base: Arrays, seed: int, layers: int = 3, rank: int = 4, examples: int = 1, staleness: int = 0) -> Contribution:
    """A device that trained a part of `base` into something random."""
    part = SPEC.part(layers, rank)
    return Contribution(subtract(random(part, seed), take(base, part)), examples, staleness, base)


def best(matrix: Product, rank: int) -> Product:
    """The best approximation of a matrix, by a plain SVD."""
    u, s, v = np.linalg.svd(matrix)
    return np.asarray((u[:, :rank] * s[:rank]) @ v[:rank])


def expected(adapter: Arrays, buffer: Sequence[Contribution], slot: Slot) -> Product | None:
    """The exact mean of what the updates did to BA, over those that trained the slot, added to BA."""
    steps, total = np.zeros((slot.out_features, slot.in_features)), 0.0
    for c in buffer:
        if slot.b in c.delta and c.base is not None:
            rank = c.delta[slot.b].shape[1]
            start = {slot.a: c.base[slot.a][:rank], slot.b: c.base[slot.b][:, :rank]}
            weight = c.num_examples * (1 + c.staleness) ** -0.5
            steps += weight * (product(add(start, c.delta), slot) - product(start, slot))
            total += weight
    return product(adapter, slot) + steps / total if total else None


devices = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 50), st.integers(0, 5)), min_size=1, max_size=5)


def fleet(base: Arrays, chosen: Sequence[tuple[int, int, int, int]]) -> list[Contribution]:
    return [trained(base, 10 + i, *each) for i, each in enumerate(chosen)]


@given(devices)
def test_the_result_is_the_best_approximation_of_the_exact_mean(chosen: list[tuple[int, int, int, int]]) -> None:
    """Whatever depth, rank, examples and age: BA is the exact mean of products, cut to rank r as a dense SVD would cut it."""
    base = random(SPEC, 1)
    buffer = fleet(base, chosen)
    new = products(base, SPEC, buffer)

    for slot in SLOTS:
        exact = expected(base, buffer, slot)
        if exact is None:  # nobody trained it
            assert (new[slot.a] == base[slot.a]).all()
            assert (new[slot.b] == base[slot.b]).all()
        else:
            np.testing.assert_allclose(product(new, slot), best(exact, SPEC.rank), atol=2e-4)


def test_one_device_is_what_it_was_trained_to() -> None:
    """A single update of full rank loses nothing: the new product is the trained one."""
    base = random(SPEC, 1)
    update = trained(base, 2)
    new = products(base, SPEC, [update])

    for slot in SLOTS:
        np.testing.assert_allclose(product(new, slot), product(add(base, update.delta), slot), atol=1e-4)


def test_the_mean_of_factors_is_not_the_mean_of_products() -> None:
    """The reason for the rule: two devices by hand, B A = 1 and 9, whose mean is 5 by products and 4 by factors."""
    slot = Slot("layer.0.query", 1, 1)
    spec = AdapterSpec((slot,), 1, 1.0)
    base = {slot.a: np.zeros((1, 1), np.float32), slot.b: np.zeros((1, 1), np.float32)}
    buffer = [
        Contribution({slot.a: np.full((1, 1), x, np.float32), slot.b: np.full((1, 1), x, np.float32)}, 1, 0, base) for x in (1, 3)
    ]

    assert float(product(products(base, spec, buffer), slot)[0, 0]) == pytest.approx(5.0)
    assert float(product(fedbuff(base, buffer), slot)[0, 0]) == pytest.approx(4.0)


@given(st.data(), devices)
def test_order_does_not_matter(data: st.DataObject, chosen: list[tuple[int, int, int, int]]) -> None:
    """The same updates in any other order make the same products."""
    base = random(SPEC, 1)
    buffer = fleet(base, chosen)
    new, other = products(base, SPEC, buffer), products(base, SPEC, data.draw(st.permutations(buffer)))

    for slot in SLOTS:
        np.testing.assert_allclose(product(new, slot), product(other, slot), atol=1e-4)


def scalar(value: float, examples: int, staleness: int = 0) -> Contribution:
    """An update of `ONE` that was trained from zero to B = value, A = 1."""
    (slot,) = ONE.slots
    base = {slot.a: np.zeros((1, 1), np.float32), slot.b: np.zeros((1, 1), np.float32)}
    return Contribution(
        {slot.a: np.ones((1, 1), np.float32), slot.b: np.full((1, 1), value, np.float32)}, examples, staleness, base
    )


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        ({}, 4.0),  # weights 1 and 4 / 2: 2 + (0 + 2 * 3) / 3
        ({"exponent": 0.0}, 4.4),  # weights 1 and 4
        ({"exponent": 1.0}, 3.5),  # weights 1 and 1
        ({"cap": 1}, 3.0),  # weights 1 and 1 / 2
        ({"server_lr": 2.0}, 6.0),
        ({"server_lr": 0.5}, 3.0),
    ],
)
def test_weights_and_step_by_hand(arguments: dict[str, Any], result: float) -> None:
    """BA = 2 and steps of 0 (one example) and 3 (four, 3 versions old): examples, cap, age and rate count as in FedBuff."""
    (slot,) = ONE.slots
    now = {slot.a: np.ones((1, 1), np.float32), slot.b: np.full((1, 1), 2, np.float32)}
    new = products(now, ONE, [scalar(0, 1), scalar(3, 4, staleness=3)], **arguments)

    assert float(product(new, slot)[0, 0]) == pytest.approx(result, rel=1e-6)


def test_an_update_of_b_alone_counts_with_the_a_it_started_from() -> None:
    """Where A is frozen and stays at home, B_i A of the base is what was trained: the mean is exact, not cut."""
    base = random(SPEC, 1)
    whole = [random(SPEC, seed) for seed in (2, 3)]
    buffer = [
        Contribution({slot.b: arrays[slot.b] for slot in SLOTS}, n, 0, base) for n, arrays in zip((1, 3), whole, strict=True)
    ]
    new = products(base, SPEC, buffer)

    for slot in SLOTS:
        mean = (whole[0][slot.b] + 3 * whole[1][slot.b]) / 4
        np.testing.assert_allclose(product(new, slot), (base[slot.b] + mean) @ base[slot.a], atol=1e-4)


def test_one_hostile_layer_leaves_the_others_as_they_are_too() -> None:
    """A version is made whole or not at all: with one layer beyond float32 no layer of it moves."""
    base = random(SPEC, 1)
    delta = {name: array * np.float32(1e30 if name in (SLOTS[1].a, SLOTS[1].b) else 1) for name, array in base.items()}
    with np.errstate(over="ignore"):
        new = products(base, SPEC, [Contribution(delta, 1, 0, base), trained(base, 2)])

    assert strategies.same(new, base)


@pytest.mark.parametrize("rule", ["products", "factors"])
def test_a_device_split_in_two_counts_the_same(rule: str) -> None:
    """K-split: an update of 10 examples is the same as two of 4 and 6 with the same delta."""
    base = random(SPEC, 1)
    whole = [trained(base, 2, examples=10), trained(base, 3, layers=1, rank=2, examples=7)]
    parts = [*(Contribution(whole[0].delta, n, 0, base) for n in (4, 6)), whole[1]]

    def result(buffer: list[Contribution]) -> Arrays:
        return products(base, SPEC, buffer) if rule == "products" else fedbuff(base, buffer)

    for slot in SLOTS:
        np.testing.assert_allclose(product(result(whole), slot), product(result(parts), slot), atol=1e-4)


def test_the_first_components_are_the_best_of_a_smaller_rank() -> None:
    """What a device of rank 1, 2 or 3 takes is the best approximation of the whole adapter there is."""
    base = random(SPEC, 1)
    new = products(base, SPEC, fleet(base, [(3, 4, 1, 0), (3, 2, 5, 0)]))

    for slot in SLOTS:
        for rank in (1, 2, 3):
            np.testing.assert_allclose(product(new, slot, rank), best(product(new, slot), rank), atol=1e-4)


@given(st.integers(1, 9), st.integers(0, 100))
def test_no_component_is_lost_to_training(columns: int, seed: int) -> None:
    """A's rows stay orthogonal and 1 / sqrt 3 long, also where BA has fewer directions than the rank."""
    rng = np.random.default_rng(seed)
    left, right = rng.normal(0, 1, (10, columns)), rng.normal(0, 1, (columns, 12))
    b, a = factors(np.hstack([left, np.zeros((10, 4))]), np.vstack([right, rng.normal(0, 1, (4, 12))]), 4)

    np.testing.assert_allclose(a @ a.T, np.eye(4) / 3, atol=1e-5)
    np.testing.assert_allclose(b @ a, best(left @ right, 4), atol=1e-4)


def test_stale_updates_are_measured_from_their_own_base() -> None:
    """An update of an old version moves BA by what it learned, not back to where it began."""
    old, now = random(SPEC, 1), random(SPEC, 5, 0.1)
    update = trained(old, 2, staleness=1)
    new = products(now, AdapterSpec(SLOTS, 4, 8.0), [update])

    for slot in SLOTS:
        step = product(add(old, update.delta), slot) - product(old, slot)
        np.testing.assert_allclose(product(new, slot), best(product(now, slot) + step, 4), atol=2e-4)


@pytest.mark.parametrize("size", [3e38, math.inf])
def test_updates_of_hostile_size_leave_the_adapter_as_it_is(size: float) -> None:
    """Finite but huge, or worse: the run goes on with the version it has."""
    base = random(SPEC, 1)
    huge = {name: np.full_like(array, size) for name, array in base.items()}
    with np.errstate(all="ignore"):
        new = products(base, SPEC, [Contribution(huge, 1, 0, base)])

    assert all((new[name] == array).all() for name, array in base.items())


def test_products_need_updates_and_their_bases() -> None:
    """An empty buffer, or an update whose start nobody knows, is refused."""
    base = random(SPEC, 1)
    with pytest.raises(DataError, match="empty"):
        products(base, SPEC, [])
    with pytest.raises(DataError, match="no base"):
        products(base, SPEC, [Contribution(base, 1, 0)])


# Parts in factors -----------------------------------------------------------------------------------------------------
def test_a_layer_is_averaged_over_those_who_trained_it() -> None:
    """Two devices train the top layer, one all three: below, that one alone counts, and in full."""
    base = random(SPEC, 1)
    buffer = [trained(base, 2, examples=1), trained(base, 3, layers=1, examples=3)]
    new = fedbuff(base, buffer)

    np.testing.assert_allclose(new[SLOTS[0].b], (base[SLOTS[0].b] + buffer[0].delta[SLOTS[0].b]), atol=1e-6)
    both = (buffer[0].delta[SLOTS[2].b] + 3 * buffer[1].delta[SLOTS[2].b]) / 4
    np.testing.assert_allclose(new[SLOTS[2].b], base[SLOTS[2].b] + both, atol=1e-6)


def test_with_a_frozen_the_mean_is_exact_at_any_rank() -> None:
    """FFA-LoRA: averaging B, zero beyond each device's rank, is averaging BA."""
    spec = AdapterSpec(SLOTS, 4, 8.0, freeze_a=True)
    base = random(spec, 1)
    chosen = [(3, 4, 2), (3, 1, 5), (2, 3, 1)]
    buffer = []
    for i, (layers, rank, examples) in enumerate(chosen):
        part = spec.part(layers, rank)
        delta = {name: random(part, 20 + i)[name] for name in part.update_shapes()}
        buffer.append(Contribution(delta, examples, 0))
    new = fedbuff(base, buffer)

    for slot in SLOTS:
        senders = [c for c in buffer if slot.b in c.delta]
        total = sum(c.num_examples for c in senders)
        step = sum(
            (c.num_examples / total * c.delta[slot.b] @ base[slot.a][: c.delta[slot.b].shape[1]] for c in senders),
            np.zeros((10, 12)),
        )
        np.testing.assert_allclose(product(new, slot), product(base, slot) + step, atol=1e-5)
        assert (new[slot.a] == base[slot.a]).all()
