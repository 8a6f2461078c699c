"""Golden vectors: token ids and the class scores they must give, without and with an adapter.

They travel in a bundle as `golden.json` and `golden.safetensors` (the adapter, under PEFT names), so that any client, in any
language, can test itself; `check` does it for ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from edge_sdk.adapters import Adapter, AdapterSpec, mismatch, shapes_of
from edge_sdk.bundle import Bundle
from edge_sdk.engines import Engine
from edge_sdk.errors import AssetError

JSON = "golden.json"
ADAPTER = "golden.safetensors"
Scores = tuple[tuple[float, ...], ...]


class Expected(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one variant answers: class scores before the softmax, one row for each sequence.

    Args:
        base: without an adapter; adapted: with the golden one.
        tolerance: how far a score may lie from its own, since machines add floating-point numbers in different orders.
    """

    base: Scores
    adapted: Scores
    tolerance: float


class Golden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `golden.json` says.

    Args:
        sequences: token ids, complete with what starts and ends them.
        rank, alpha: of the golden adapter, which fills every slot of the bundle.
        expected: by variant.
    """

    sequences: tuple[tuple[int, ...], ...]
    rank: int
    alpha: float
    expected: dict[str, Expected]


@dataclass(frozen=True)
class Outcome:
    """Largest distance from an expected score, without and with the adapter, and what is allowed."""

    base: float
    adapted: float
    tolerance: float

    @property
    def good(self) -> bool:
        return self.base <= self.tolerance and self.adapted <= self.tolerance  # NaN is never good


def read(folder: Path, bundle: Bundle) -> tuple[Golden, Adapter]:
    """Raises: AssetError: the files are missing or do not fit the bundle."""
    try:
        golden = msgspec.json.decode((folder / JSON).read_bytes(), type=Golden)
        arrays = load_file(folder / ADAPTER)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise AssetError(f"{folder} holds no readable golden vectors ({error}); export the bundle again") from error
    adapter = Adapter(arrays, AdapterSpec(bundle.slots, golden.rank, golden.alpha))
    if problem := mismatch(shapes_of(arrays), adapter.spec.shapes()):
        raise AssetError(f"{folder / ADAPTER} does not fit the bundle: {problem}; export the bundle again")
    return golden, adapter


def answers(engine: Engine, golden: Golden, adapter: Adapter) -> tuple[Scores, Scores]:
    """The engine's scores without and with the golden adapter; it is left without one."""
    sequences = [list(ids) for ids in golden.sequences]
    engine.set_adapter(None)
    base = engine.logits_of(sequences)
    engine.set_adapter(adapter)
    adapted = engine.logits_of(sequences)
    engine.set_adapter(None)
    return _rows(base), _rows(adapted)


def check(engine: Engine, variant: str, golden: Golden, adapter: Adapter) -> Outcome:
    """Compares an engine's answers with those of its variant.

    Raises:
        AssetError: the golden vectors know no such variant.
    """
    if variant not in golden.expected:
        raise AssetError(f"the golden vectors have no answers for variant {variant!r}; export the bundle again")
    expected = golden.expected[variant]
    base, adapted = answers(engine, golden, adapter)
    return Outcome(_distance(base, expected.base), _distance(adapted, expected.adapted), expected.tolerance)


def _rows(scores: NDArray[np.float32]) -> Scores:
    return tuple(tuple(round(float(value), 6) for value in row) for row in scores)


def _distance(found: Scores, expected: Scores) -> float:
    if len(found) != len(expected):
        return float("inf")
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max())
