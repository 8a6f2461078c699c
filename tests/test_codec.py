"""What int8 and float16 make of an update, and what error feedback makes up for."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import codec, wire
from edge_sdk.adapters import AdapterSpec, Array, Slot, add, subtract
from edge_sdk.codec import Encoding, Layout
from edge_sdk.errors import DataError
from edge_sdk.protocol import Update
from tests import strategies

SHAPES = {"a": (2, 5), "b": (4, 2)}  # LoRA's A and B of rank 2
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
moderate = st.floats(-(2.0**100), 2.0**100, width=32)
deltas = strategies.adapters(SHAPES, moderate)
small = strategies.adapters(SHAPES, st.floats(-1, 1, width=32))


def coded(delta: dict[str, Array], encoding: Encoding = "int8") -> dict[str, Array]:
    """What the other side reads."""
    return codec.decode(codec.encode(delta, encoding), encoding, SHAPES)


def components(array: Array) -> Array:
    """A's rows, B's columns: what has one scale."""
    return array if array.shape[0] < array.shape[1] else array.T


def test_int8_by_hand() -> None:
    """A scale for each row of A and each column of B, in the order of names; codes round to the nearest."""
    delta = {
        "b": np.array([[127, 0], [-1.5, 0], [0.4, 0], [0, 0]], np.float32),
        "a": np.array([[254, -254, 2, 3.1, 0], [1, 0, 0, 0, -0.5]], np.float32),
    }
    tensors = codec.encode(delta, "int8")

    assert tensors["scales"].tolist() == [2.0, np.float32(1 / 127), 1.0, 0.0]
    assert tensors["values"].tolist() == [127, -127, 1, 2, 0, 127, 0, 0, 0, -64, 127, -2, 0, 0, 0, 0, 0, 0]
    assert coded(delta)["b"].tolist() == [[127, 0], [-2, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(delta=small)
def test_the_tensors_are_what_the_layout_says(encoding: Encoding, delta: dict[str, Array]) -> None:
    """The server knows names, types and sizes before a byte arrives."""
    types = {"float32": "F32", "float16": "F16", "int8": "I8"}
    found: Layout = {name: (types[str(x.dtype)], x.shape) for name, x in codec.encode(delta, encoding).items()}

    assert found == codec.layout(SHAPES, encoding)


@given(deltas)
def test_no_number_is_off_by_more_than_half_a_scale(delta: dict[str, Array]) -> None:
    """Row by row of what has one scale; the largest number of a row is right to float32's digits."""
    arrived = coded(delta)

    for name in SHAPES:
        for row, other in zip(components(delta[name]), components(arrived[name]), strict=True):
            largest = float(np.abs(row).max())
            assert np.abs(row - other).max() <= largest / 127 / 2 * (1 + 1e-5) + 1e-36
            assert np.abs(other).max() == pytest.approx(largest, rel=1e-6, abs=1e-36)


@given(deltas)
def test_a_huge_row_costs_no_other_row_its_digits(delta: dict[str, Array]) -> None:
    """Rows do not share a scale."""
    other = {name: array.copy() for name, array in delta.items()}
    other["a"][0] = 1e30
    other["b"][:, 0] = 1e30

    for name in SHAPES:
        np.testing.assert_array_equal(components(coded(delta)[name])[1], components(coded(other)[name])[1])


@given(small)
def test_float16_is_numpys(delta: dict[str, Array]) -> None:
    """Each number to the nearest float16."""
    assert strategies.same(coded(delta, "fp16"), {k: x.astype(np.float16).astype(np.float32) for k, x in delta.items()})


@given(strategies.adapters(SHAPES))
def test_float32_loses_nothing(delta: dict[str, Array]) -> None:
    """To the last bit, and whatever the size."""
    assert strategies.same(coded(delta, "fp32"), delta)


@pytest.mark.parametrize(
    ("encoding", "value"),
    [
        *(("int8", value) for value in (math.nan, math.inf, -math.inf, 2e38)),
        *(("fp16", value) for value in (math.nan, math.inf, -math.inf, 65505.0, -1e6)),
    ],
)
def test_a_number_that_would_not_arrive_is_an_error_here(encoding: Encoding, value: float) -> None:
    """What overflows is told on the device, with the array's name, and never sent."""
    delta = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    delta["b"][3, 1] = value

    with pytest.raises(DataError, match=f"b holds a number that {encoding} does not"):
        codec.encode(delta, encoding)


@pytest.mark.parametrize(("encoding", "value"), [("int8", 1e38), ("fp16", 65504.0)])
def test_the_largest_numbers_arrive(encoding: Encoding, value: float) -> None:
    """The bound itself is inside, and finite on the other side."""
    delta = {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}

    assert all(np.allclose(array, value, rtol=1e-6) for array in coded(delta, encoding).values())


@given(st.lists(small, min_size=1, max_size=8))
def test_with_feedback_the_sum_arrives(steps: list[dict[str, Array]]) -> None:
    """Whatever is sent, the sum of what arrived is the sum of what was sent but for the last rest, half a scale at most."""
    zero = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    rest, sent, arrived = zero, zero, zero
    for delta in steps:
        owed = add(delta, rest)
        sent, arrived, rest = add(sent, delta), add(arrived, coded(owed)), codec.lost(owed, "int8")

    for name in SHAPES:
        np.testing.assert_allclose(arrived[name] + rest[name], sent[name], atol=1e-5)
        assert np.abs(sent[name] - arrived[name]).max() <= 1.01 / 127 / 2 + 1e-5  # owed is at most 1 and half a scale


def test_without_feedback_small_numbers_never_arrive() -> None:
    """The reason for it: beside a 1, a 0.003 is rounded away every time; with it, a third of a step comes every third time."""
    delta = {"a": np.array([[1, 0.003, 0, 0, 0], [0, 0, 0, 0, 0]], np.float32), "b": np.zeros((4, 2), np.float32)}
    alone, rest, total = 0.0, {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}, 0.0
    for _ in range(100):
        alone += float(coded(delta)["a"][0, 1])
        owed = add(delta, rest)
        total += float(coded(owed)["a"][0, 1])
        rest = codec.lost(owed, "int8")

    assert alone == 0.0
    assert total == pytest.approx(0.3, abs=1 / 127)


def test_what_is_lost_is_the_difference() -> None:
    """lost is arrays - decode(encode(arrays)), to the bit."""
    rng = np.random.default_rng(0)
    delta = {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in SHAPES.items()}

    assert strategies.same(codec.lost(delta, "int8"), subtract(delta, coded(delta)))
    assert not any(array.any() for array in codec.lost(delta, "fp32").values())


QWEN = AdapterSpec(
    tuple(Slot(f"layers.{i}.self_attn.{n}", 896, out) for i in range(24) for n, out in (("q_proj", 896), ("v_proj", 128))),
    8,
    16.0,
)


def test_int8_takes_little_more_than_a_quarter_of_the_bytes() -> None:
    """Of LoRA on q and v of a model like Qwen2.5-0.5B, 96 tensors of 540,672 numbers, header and message counted."""
    rng = np.random.default_rng(0)
    delta = {name: rng.normal(0, 1e-3, shape).astype(np.float32) for name, shape in QWEN.shapes().items()}
    sizes = {encoding: len(wire.pack(Update("d" * 32, 3, 16, {"loss": 0.5}, 24, 8, encoding), delta)) for encoding in ENCODINGS}

    assert (len(delta), sum(array.size for array in delta.values())) == (96, 540_672)
    assert sizes["int8"] / (4 * 540_672) < 0.252
    assert sizes["fp16"] / (4 * 540_672) < 0.501
    assert sizes["int8"] < 0.252 * sizes["fp32"]
