"""FedBuff by hand, and what must hold for any buffer."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.adapters import Array, Arrays
from edge_sdk.errors import DataError
from edge_server.aggregation import Contribution, fedbuff, staleness_weight
from tests import strategies  # noqa: F401  # its hypothesis profile

Update = tuple[int, int, int]  # first and second value of the delta, number of examples

updates = st.lists(st.tuples(st.integers(-1000, 1000), st.integers(-1000, 1000), st.integers(1, 500)), min_size=1, max_size=8)
staleness = st.integers(0, 1000)


def arrays(*values: float) -> dict[str, Array]:
    return {"w": np.array(values, np.float32)}


def fresh(items: list[Update], staleness: int = 0) -> list[Contribution]:
    return [Contribution(arrays(x, y), n, staleness) for x, y, n in items]


def values(adapter: Arrays) -> list[float]:
    return [float(value) for value in adapter["w"]]


def test_a_buffer_by_hand() -> None:
    """Weights are examples times (1 + staleness)^-1/2, and the sum of weights divides."""
    buffer = [Contribution(arrays(1.0, 0.0), 2, 0), Contribution(arrays(0.0, 8.0), 4, 3)]

    assert values(fedbuff(arrays(10.0, 20.0), buffer)) == [10.5, 24.0]  # weights 2 and 4 / 2


def test_the_exponent_says_how_fast_updates_age() -> None:
    """With exponent 1 an update 3 versions old counts a quarter, with 0 it counts in full."""
    buffer = [Contribution(arrays(1.0), 1, 0), Contribution(arrays(6.0), 1, 3)]

    assert values(fedbuff(arrays(0.0), buffer, exponent=1.0)) == [2.0]
    assert values(fedbuff(arrays(0.0), buffer, exponent=0.0)) == [3.5]


@given(updates)
def test_fresh_updates_make_exactly_fedavg(items: list[Update]) -> None:
    """With nothing stale and server_lr 1 the result is the mean of deltas by examples, to the last bit."""
    total = sum(n for _, _, n in items)
    mean = [Fraction(sum(item[i] * item[2] for item in items), total) for i in (0, 1)]

    assert values(fedbuff(arrays(0.0, 0.0), fresh(items))) == [float(np.float32(float(m))) for m in mean]


@given(updates, st.integers(-1000, 1000), staleness)
def test_equal_staleness_makes_the_mean_of_the_trained_adapters(items: list[Update], start: int, age: int) -> None:
    """However old, updates of one age give McMahan's sum of n_k/n times the trained adapters."""
    trained = [np.array([start + x, start + y], np.float64) * n for x, y, n in items]
    mean = sum(trained) / sum(n for _, _, n in items)

    np.testing.assert_allclose(fedbuff(arrays(start, start), fresh(items, age))["w"], mean, rtol=1e-5, atol=1e-3)


@given(st.data(), st.lists(st.tuples(st.integers(-1000, 1000), st.integers(1, 500), staleness), min_size=1, max_size=8))
def test_order_does_not_matter(data: st.DataObject, items: list[tuple[int, int, int]]) -> None:
    """The buffer is a set: any order of arrival gives the same adapter."""
    buffer = [Contribution(arrays(x), n, age) for x, n, age in items]
    shuffled = data.draw(st.permutations(buffer))

    np.testing.assert_allclose(fedbuff(arrays(1.0), shuffled)["w"], fedbuff(arrays(1.0), buffer)["w"], rtol=1e-6, atol=1e-6)


@given(updates)
def test_the_mean_stays_between_its_updates(items: list[Update]) -> None:
    """No update can push the adapter further than its own delta does."""
    [x, _] = values(fedbuff(arrays(0.0, 0.0), fresh(items)))

    assert min(item[0] for item in items) <= x <= max(item[0] for item in items)


def test_a_fresh_update_counts_in_full() -> None:
    """The staleness weight is 1 at 0, 1/2 at 3 and 1/3 at 8."""
    assert [staleness_weight(0), staleness_weight(3)] == [1.0, 0.5]
    assert staleness_weight(8) == pytest.approx(1 / 3)


@given(staleness, staleness, st.floats(0.01, 4.0))
def test_older_updates_never_count_more(a: int, b: int, exponent: float) -> None:
    """The weight falls strictly with staleness, and stays above zero."""
    assert (staleness_weight(a, exponent) > staleness_weight(b, exponent)) == (a < b)
    assert 0 < staleness_weight(a, exponent) <= 1


@given(st.integers(1, 10_000_000), st.integers(1, 1000))
def test_claimed_examples_are_capped(claimed: int, cap: int) -> None:
    """A device that claims more than `cap` examples weighs as much as one that has `cap`, and no less if it has fewer."""
    honest = Contribution(arrays(-1.0, 3.0), cap, 0)
    boaster, counted = (Contribution(arrays(4.0, 0.0), n, 0) for n in (claimed, min(claimed, cap)))
    capped = fedbuff(arrays(0.0, 0.0), [honest, boaster], cap=cap)

    assert values(capped) == values(fedbuff(arrays(0.0, 0.0), [honest, counted], cap=10**9))


@given(updates, st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_server_lr_scales_the_step(items: list[Update], server_lr: float) -> None:
    """The step is server_lr times the mean delta: exact for powers of two."""
    full = fedbuff(arrays(0.0, 0.0), fresh(items))

    assert values(fedbuff(arrays(0.0, 0.0), fresh(items), server_lr)) == [server_lr * value for value in values(full)]


def test_the_result_is_float32_and_new() -> None:
    """What is published is float32 under the same names, and the old adapter is left alone."""
    old = {"a": np.ones((2, 3), np.float32), "b": np.ones((3, 2), np.float32)}
    new = fedbuff(old, [Contribution({name: 2 * array for name, array in old.items()}, 7, 1)], server_lr=0.5)

    assert {name: (array.dtype, array.shape) for name, array in new.items()} == {
        "a": (np.dtype(np.float32), (2, 3)),
        "b": (np.dtype(np.float32), (3, 2)),
    }
    assert all((array == 2).all() for array in new.values())
    assert all((array == 1).all() for array in old.values())


def test_an_array_is_averaged_over_those_who_sent_it() -> None:
    """Of a device that trained less, what is absent is no vote for zero; what nobody sent keeps its bits."""
    adapter = {**arrays(1.0, 1.0), "v": np.ones(1, np.float32), "u": np.full(1, 0.1, np.float32)}
    alone = {**arrays(2.0, 0.0), "v": np.full(1, 7, np.float32)}
    new = fedbuff(adapter, [Contribution(alone, 1, 0), Contribution(arrays(6.0, 4.0), 3, 0)])

    assert (values(new), new["v"].tolist()) == ([6.0, 4.0], [8.0])  # 1 + (2 + 18) / 4 and 1 + 12 / 4; 1 + 7
    assert new["u"].tobytes() == adapter["u"].tobytes()


def test_a_smaller_rank_counts_as_zero_beyond_it() -> None:
    """B of rank 1 beside B of rank 2, by hand: the second column is halved, since both devices have a say in it."""
    adapter = {"b": np.zeros((1, 2), np.float32)}
    buffer = [
        Contribution({"b": np.array([[4.0, 6.0]], np.float32)}, 1, 0),
        Contribution({"b": np.full((1, 1), 2, np.float32)}, 1, 0),
    ]

    for order in (buffer, buffer[::-1]):
        assert fedbuff(adapter, order)["b"].tolist() == [[3.0, 3.0]]
    assert fedbuff(adapter, buffer[1:])["b"].tolist() == [[2.0, 0.0]]


def test_an_empty_buffer_is_refused() -> None:
    """Nothing cannot be averaged."""
    with pytest.raises(DataError, match="sum to zero"):
        fedbuff(arrays(1.0), [])


def test_a_sum_beyond_float32_leaves_the_adapter_as_it_is() -> None:
    """Finite updates of hostile size cannot put infinity into a published adapter."""
    near_the_limit = arrays(3e38, 1.0)

    assert values(fedbuff(near_the_limit, [Contribution(near_the_limit, 1, 0)])) == values(near_the_limit)
    assert values(fedbuff(near_the_limit, [Contribution(arrays(1.0, 1.0), 1, 0)], server_lr=1e300)) == values(near_the_limit)
