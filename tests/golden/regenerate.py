"""Writes `update.safetensors`, the bytes a client in another language compares itself with.

    python -m tests.golden.regenerate

Run it only when the wire format is meant to change, and say so in the change.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_sdk import wire
from edge_sdk.adapters import AdapterSpec, Array, Slot
from edge_sdk.protocol import Update

UPDATE_FILE = Path(__file__).with_name("update.safetensors")

SPEC = AdapterSpec((Slot("layer.0.query", 3, 2),), rank=1, alpha=2.0)
UPDATE = Update("0123456789abcdef", version=7, num_examples=12, metrics={"loss": 0.5, "soft_examples": 64.0})
DELTA: dict[str, Array] = {
    "base_model.model.layer.0.query.lora_A.weight": np.array([[0.5, -1.25, 3.0]], np.float32),
    "base_model.model.layer.0.query.lora_B.weight": np.array([[0.0], [-0.0078125]], np.float32),
}


def update_bytes() -> bytes:
    return wire.pack(UPDATE, DELTA)


if __name__ == "__main__":
    UPDATE_FILE.write_bytes(update_bytes())
