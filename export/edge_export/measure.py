"""What a variant costs and how well it agrees with fp32, measured through the same engine that devices run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_export.probe import Agreement, Probe, compare
from edge_sdk.engines import Engine, Sampling
from edge_sdk.errors import DataError

WRITE = 32  # tokens


@dataclass(frozen=True)
class Measured:
    """One row of the exporter's table.

    Args:
        size: of the file, bytes.
        load: seconds until the first answer can be asked for.
        texts: short texts scored in a second.
        tokens: tokens written in a second, one text at a time; None for an encoder.
    """

    name: str
    size: int
    load: float
    texts: float
    tokens: float | None
    agreement: Agreement


def measure(name: str, load: Callable[[], Engine], path: Path, texts: Probe, reference: NDArray[np.float32] | None) -> Measured:
    """Opens a variant, scores the judging texts, and writes a little.

    Args:
        reference: fp32's class scores on `texts.judge`; None where this variant is the reference.
    """
    started = time.perf_counter()
    engine = load()
    loaded = time.perf_counter() - started
    engine.logits(texts.choose[:16])  # threads and memory are set up by the first call
    started = time.perf_counter()
    scores = engine.logits(texts.judge)
    took = time.perf_counter() - started
    agreement = compare(scores if reference is None else reference, scores, texts.labels)
    return Measured(name, path.stat().st_size, loaded, len(texts.judge) / took, _writing(engine, texts.judge[0]), agreement)


def _writing(engine: Engine, prompt: str) -> float | None:
    """Tokens written in a second; None where the model does not write, or ends at once."""
    try:
        started = time.perf_counter()
        written = engine.generate(prompt, Sampling(WRITE))
        took = time.perf_counter() - started
        return len(engine.encoder.plain([written])[0]) / took
    except DataError:  # an encoder, or nothing written
        return None
