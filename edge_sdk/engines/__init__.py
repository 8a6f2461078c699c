"""Inference on the device: what an engine can do; `onnx.py` does it with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_sdk.adapters import AdapterSpec, Arrays


class Engine(Protocol):
    """Scores texts for one task with one base model and any adapter."""

    def set_adapter(self, arrays: Arrays | None, spec: AdapterSpec) -> None:
        """Uses an adapter from the next call on; None is the base model."""
        ...

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Class scores (n, n_classes) before the softmax."""
        ...
