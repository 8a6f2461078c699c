"""How the numbers of an update travel: float32, float16, or int8 with what rounding lost carried into the next update.

float32 is what safetensors readers expect, an array a name. The others are packed, since the names of 96 small tensors
would cost more than rounding saves: all arrays, in the order of their names, make one flat tensor `values`; int8 has a second
one, `scales`. Both sides know the shapes, which say where to cut. Pure; which bytes may arrive is `wire.py`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_sdk.adapters import Array, Arrays, Shapes, row_major, shapes_of, subtract
from edge_sdk.errors import DataError

Encoding = Literal["fp32", "fp16", "int8"]
Tensors = Mapping[str, NDArray[Any]]
Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> type, as safetensors names it, and shape

STEPS = 127  # int8 is symmetric: -127 to 127
LARGEST = {"fp16": 65504.0, "int8": 1e38}  # of int8: 127 scales of it are finite in float32


def layout(shapes: Shapes, encoding: Encoding) -> Layout:
    """Exact tensors of an update whose arrays have these shapes; so its size is known before it comes."""
    if encoding == "fp32":
        return {name: ("F32", shape) for name, shape in shapes.items()}
    count = sum(map(math.prod, shapes.values()))
    if encoding == "fp16":
        return {"values": ("F16", (count,))}
    return {"values": ("I8", (count,)), "scales": ("F32", (sum(map(min, shapes.values())),))}


def encode(arrays: Arrays, encoding: Encoding) -> dict[str, NDArray[Any]]:
    """The tensors that travel.

    int8 has a scale for every row of an array's shorter side: for each of LoRA's components one in A, a row, and one in B, a
    column. Row by row B would have a scale for every `rank` numbers, a third of its bytes. A scale is a row's largest absolute
    value over 127, so an error is at most half a scale; a row of zeros, or of nothing above 1e-36, comes out as zeros.

    Raises:
        DataError: a number is NaN, infinite, or beyond what the encoding holds.
    """
    if encoding == "fp32":
        return dict(row_major(arrays))
    names = sorted(arrays)
    for name in names:
        if not (np.abs(arrays[name]) <= LARGEST[encoding]).all():
            raise DataError(f"{name} holds a number that {encoding} does not: NaN, or beyond {LARGEST[encoding]:g}")
    if encoding == "fp16":
        return {"values": _flat(arrays[name].astype(np.float16) for name in names)}
    rows = [_rows(arrays[name]) for name in names]
    scales = [(np.abs(each).max(axis=1, initial=0) / STEPS).astype(np.float32) for each in rows]
    codes = (_codes(each, scale) for each, scale in zip(rows, scales, strict=True))
    return {"values": _flat(codes), "scales": _flat(scales)}


def decode(tensors: Tensors, encoding: Encoding, shapes: Shapes) -> dict[str, Array]:
    """The arrays again; of hostile scales they may hold NaN or infinity.

    Args:
        tensors: as `layout(shapes, encoding)` says.

    Raises:
        DataError: a code or scale that `encode` never makes.
    """
    if encoding == "fp32":
        return dict(tensors)
    values = tensors["values"]
    names = sorted(shapes)
    cuts = np.cumsum([math.prod(shapes[name]) for name in names])[:-1]
    pieces = dict(zip(names, np.split(values, cuts), strict=True))
    if encoding == "fp16":
        return {name: piece.reshape(shapes[name]).astype(np.float32) for name, piece in pieces.items()}
    scales = tensors["scales"]
    if (values < -STEPS).any() or (scales < 0).any():
        raise DataError("int8 has codes from -127 to 127, and no negative scales")
    parts = np.split(scales, np.cumsum([min(shapes[name]) for name in names])[:-1])
    arrays: dict[str, Array] = {}
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at the numbers
        for (name, piece), scale in zip(pieces.items(), parts, strict=True):
            tall = shapes[name][0] > shapes[name][1]
            rows = piece.reshape(len(scale), -1).astype(np.float32) * scale[:, None]
            arrays[name] = np.ascontiguousarray(rows.T if tall else rows)
    return arrays


def lost(arrays: Arrays, encoding: Encoding) -> dict[str, Array]:
    """What the other side will miss: arrays - decode(encode(arrays)).

    Added to the next update it is not lost but late, so that the sum of what arrived is the sum of what was sent but for the
    last such rest. Sources: Seide et al. 2014, "1-Bit Stochastic Gradient Descent"; Karimireddy et al. 2019, "Error
    Feedback Fixes SignSGD".

    Raises:
        DataError: as `encode`.
    """
    return subtract(arrays, decode(encode(arrays, encoding), encoding, shapes_of(arrays)))


def _rows(array: Array) -> Array:
    """The array, or its transpose where that has fewer rows."""
    return array.T if array.shape[0] > array.shape[1] else array


def _codes(rows: Array, scales: Array) -> NDArray[np.int8]:
    safe = np.where(scales >= np.finfo(np.float32).tiny, scales, np.inf)  # below it a quotient is not what it should be
    return np.clip(np.rint(rows / safe[:, None]), -STEPS, STEPS).astype(np.int8)


def _flat(arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([array.ravel() for array in arrays])
