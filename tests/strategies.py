"""Hypothesis strategies shared by the tests, and the one profile they run under."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edge_sdk.adapters import Array, Shapes
from edge_sdk.protocol import Evaluation, Judgment, Metrics, Sample, Text, Update
from edge_sdk.wire import MAX_EXAMPLES, MAX_METRICS

# A busy machine is no failure of a property, so there is no deadline. What reads hostile bytes is tried harder.
settings.register_profile("tandem", parent=settings.default, deadline=None, max_examples=40)
settings.load_profile("tandem")
fuzzing = settings(max_examples=120)

floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def adapters(shapes: Shapes, elements: st.SearchStrategy[float] = floats32) -> st.SearchStrategy[dict[str, Array]]:
    """Finite float32 arrays of these names and shapes."""
    return st.fixed_dictionaries({name: hnp.arrays(np.float32, shape, elements=elements) for name, shape in shapes.items()})


def whole_adapters(shapes: Shapes) -> st.SearchStrategy[dict[str, Array]]:
    """Arrays of small whole numbers, whose sums are exact in any order."""
    return adapters(shapes, st.integers(-1000, 1000).map(float))


def metrics() -> st.SearchStrategy[Metrics]:
    values = st.floats(allow_nan=False, allow_infinity=False)
    return st.dictionaries(st.text(max_size=MAX_METRICS), values, max_size=4)


def updates() -> st.SearchStrategy[Update]:
    """Updates that break no rule."""
    return st.builds(Update, st.text(max_size=20), st.integers(0, 2**60), st.integers(1, MAX_EXAMPLES), metrics())


def evaluations() -> st.SearchStrategy[Evaluation]:
    return st.builds(Evaluation, st.text(max_size=20), st.integers(0, 2**60), st.integers(0, MAX_EXAMPLES), metrics())


def judgments() -> st.SearchStrategy[Judgment]:
    """Judgments that break no rule."""
    covers = st.lists(st.integers(0, 99), max_size=4, unique=True).map(tuple)
    counts = st.integers(0, MAX_EXAMPLES)
    return st.builds(Judgment, st.text(max_size=20), st.integers(0, 2**60), counts, metrics(), covers)


printable = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), min_size=1, max_size=20)
ids = st.text(min_size=1, max_size=MAX_METRICS)


def texts() -> st.SearchStrategy[Text]:
    """Lines of a sheet that break no rule."""
    return st.builds(Text, ids, printable, st.integers(0, 9))


def samples(n_classes: int = 2) -> st.SearchStrategy[Sample]:
    """Samples of the feed that break no rule."""
    soft = st.tuples(*[st.floats(0, 1)] * n_classes).filter(any)
    name = st.text(max_size=8)
    numbers = st.integers(0, 2**60)
    return st.builds(Sample, numbers, ids, printable, name, soft, st.floats(0, 1), numbers, name, name)


@st.composite
def damaged(draw: st.DrawFn, body: bytes) -> bytes:
    """`body` after up to four accidents: a byte changed, a span cut out, or bytes put in."""
    found = bytearray(body)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(found)))
        match draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip" if at < len(found):
                found[at] ^= draw(st.integers(1, 255))
            case "cut":
                del found[at : at + draw(st.integers(1, 64))]
            case _:
                found[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(found)


# Headers of safetensors files, from right to absurd -------------------------------------------------------------------
SHARP_NUMBERS = (0, 1, 3, 4, 8, -1, -4, True, False, 1.0, 0.5, 2**31, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf"))
numbers = st.sampled_from(SHARP_NUMBERS) | st.integers() | st.floats()
any_text = st.text(st.characters(), max_size=12)  # with lone surrogates
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | numbers | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def headers(draw: st.DrawFn, shapes: Shapes, message: str) -> list[tuple[str, Any]]:
    """(name, value) pairs of a header for these tensors: each part is right, or wrong in a way somebody might try."""
    entries: list[tuple[str, Any]] = []
    position = 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        span = [position, position + size]
        overlap = [max(0, position - 4), position + size - 4]
        gap = [position + 4, position + size + 4]
        entry: Any = {
            "dtype": draw(_mostly("F32", st.sampled_from(["F64", "F16", "BF16", "I32", "f32", ""]) | json_values)),
            "shape": draw(_mostly(list(shape), st.sampled_from([list(shape[::-1]), [list(shape)], [*shape, 1]]) | json_values)),
            "data_offsets": draw(_mostly(span, st.sampled_from([overlap, gap, span[::-1], [-4, size - 4]]) | json_values)),
            **draw(_mostly({}, st.dictionaries(any_text, json_values, max_size=2))),
        }
        entries.append((draw(_mostly(name, any_text)), draw(_mostly(entry, json_values))))
        position += size
    metadata = draw(_mostly({"message": message}, st.dictionaries(any_text, json_values, max_size=2) | json_values))
    entries += draw(_mostly([("__metadata__", metadata)], st.lists(st.tuples(any_text, json_values), max_size=2)))
    entries += draw(_mostly([], st.lists(st.sampled_from(entries), max_size=2)))  # a name twice
    return draw(st.permutations(entries))


def header_bytes(entries: list[tuple[str, Any]]) -> bytes:
    """JSON as `json.dumps` has it (NaN, escaped surrogates and all), repeated names included."""
    return ("{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in entries) + "}").encode()


def _mostly(right: Any, wrong: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 15).flatmap(lambda chance: st.just(right) if chance else wrong)


# Scores ---------------------------------------------------------------------------------------------------------------
Scores = NDArray[np.float32]


@st.composite
def score_tables(draw: st.DrawFn, max_rows: int = 40) -> Scores:
    """Class scores (n, n_classes) in which no two rows are equally confident."""
    rows, classes = draw(st.integers(0, max_rows)), draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = np.zeros((rows, classes), np.float32)
    margins = rng.permutation(rows) + 1
    scores[np.arange(rows), rng.integers(0, classes, rows)] = margins
    return scores + rng.integers(-5, 5, (rows, 1)).astype(np.float32)


def same(a: Mapping[str, NDArray[Any]], b: Mapping[str, NDArray[Any]]) -> bool:
    """Whether two sets of arrays have the same names, types, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes() for name in a
    )
