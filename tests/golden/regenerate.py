"""Writes `update.safetensors` and `requests.json`, what a client in another language compares itself with.

    python -m tests.golden.regenerate

Run it only when the wire format is meant to change, and say so in the change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk import identity, wire
from edge_sdk.adapters import AdapterSpec, Array, Slot
from edge_sdk.protocol import Update

UPDATE_FILE = Path(__file__).with_name("update.safetensors")
REQUESTS_FILE = Path(__file__).with_name("requests.json")

SPEC = AdapterSpec((Slot("layer.0.query", 3, 2),), rank=1, alpha=2.0)
UPDATE = Update("0123456789abcdef", version=7, num_examples=12, metrics={"loss": 0.5, "soft_examples": 64.0})
DELTA: dict[str, Array] = {
    "base_model.model.layer.0.query.lora_A.weight": np.array([[0.5, -1.25, 3.0]], np.float32),
    "base_model.model.layer.0.query.lora_B.weight": np.array([[0.0], [-0.0078125]], np.float32),
}


def update_bytes() -> bytes:
    return wire.pack(UPDATE, DELTA)


def request(seed: str, method: str, path: str, query: str, body: str, time: int, epoch: str, nonce: str) -> dict[str, Any]:
    """A signed request in all its parts: what goes in, what is signed, and the headers that come out."""
    given = dict(locals())
    key = bytes.fromhex(seed)
    claim = identity.claim(key, body.encode(), identity.Clock(epoch, time), nonce)
    base = identity.canonical(method, path, query, claim).decode()
    return {**given, "device": claim.device, "base": base, "headers": identity.sign(key, method, path, query, claim)}


def requests() -> list[dict[str, Any]]:
    ask = '{"device":"d","can_train":true}'
    first, second = bytes(range(32)).hex(), "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"  # RFC 8032, 7.1
    return [
        request(first, "POST", "/v1/work", "", ask, 1764000000, "00112233445566aa", "8899aabbccddeeff"),
        request(first, "GET", "/v1/synthetic", "since=3&limit=10", "", 0, identity.NO_EPOCH, "0000000000000001"),
        request(second, "POST", "/v1/results", "", "\x00a\ud7ff", 1764000001, "ffffffffffffffff", "0123456789abcdef"),
    ]


if __name__ == "__main__":
    UPDATE_FILE.write_bytes(update_bytes())
    REQUESTS_FILE.write_text(json.dumps(requests(), indent=1) + "\n")
