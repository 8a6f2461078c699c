"""Bytes <-> messages, bounded before they are parsed; every failure is one `WireError`.

Control messages are JSON. An update is one safetensors file whose `__metadata__` holds the `Update` message under
`message`. Whatever bytes arrive, `decode` and `unpack` return a checked value or raise `WireError`, never anything else.
No pickle, no code, no sockets.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import numpy as np
from safetensors.numpy import save

from edge_sdk.adapters import Array, Arrays, Shapes, mismatch, not_finite
from edge_sdk.errors import WireError
from edge_sdk.protocol import Evaluation, Result, Update

JSON_TYPE = "application/json"
TENSORS_TYPE = "application/vnd.safetensors"
PROBLEM_TYPE = "application/problem+json"

MAX_JSON = 1 << 20  # a manifest lists every LoRA slot: about 100 bytes each
MAX_HEADER = 1 << 20  # safetensors allows 100 MB, which is a weapon
MAX_TENSORS = 4096
MAX_EXAMPLES = 10_000_000
MAX_METRICS = 64
MIN_EXAMPLES: dict[type, int] = {Update: 1, Evaluation: 0}

T = TypeVar("T")


def encode(message: msgspec.Struct) -> bytes:
    return msgspec.json.encode(message)


def decode(body: bytes, kind: type[T], limit: int = MAX_JSON) -> T:
    """Raises: WireError: too long, not JSON, or not exactly a `kind`."""
    if len(body) > limit:
        raise WireError("too-large", f"a message may have {limit} bytes, this one has {len(body)}", 413)
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError("bad-message", f"not a valid message: {error}") from error
    except Exception as error:  # a struct's own bounds (SettingsError) reach us through msgspec
        raise WireError("bad-message", str(error)) from error


def pack(update: Update, delta: Arrays) -> bytes:
    """One safetensors file: float32 tensors and the message; the same input gives the same bytes."""
    return bytes(save(dict(delta), metadata={"message": encode(update).decode()}))


def unpack(body: bytes, shapes: Shapes) -> tuple[Update, dict[str, Array]]:
    """The message and the tensors of an update, after every check that needs no knowledge of the run's state.

    Raises:
        WireError: `bad-tensors` (not safetensors, or too many tensors), `wrong-shape` (names, shapes or types differ from
            the adapter's slots), `not-finite` (NaN or infinity), `bad-message`.
    """
    metadata, arrays = _read(body, shapes)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("message"), str):
        raise WireError("bad-message", "the tensors carry no `message` in their metadata")
    update = decode(metadata["message"].encode(errors="replace"), Update)
    check_result(update)
    return update, arrays


def pack_adapter(arrays: Arrays) -> bytes:
    """A global adapter as PEFT's `adapter_model.safetensors`."""
    return bytes(save(dict(arrays), metadata={"format": "pt"}))


def unpack_adapter(body: bytes, shapes: Shapes) -> dict[str, Array]:
    """Raises: WireError: as `unpack`, for the tensors."""
    return _read(body, shapes)[1]


def size_limit(shapes: Shapes) -> int:
    """The largest file with these tensors: float32 values, the header and its length."""
    return 4 * sum(math.prod(shape) for shape in shapes.values()) + MAX_HEADER + 8


def update_id(device: str, version: int, body_sha256: str) -> str:
    """Names an update by who sent what for which base version, so that a repeated upload is recognised."""
    return hashlib.sha256(f"{device}\n{version}\n{body_sha256}".encode()).hexdigest()


def check_result(result: Result) -> None:
    """Raises: WireError: counts or names out of bounds, or a metric that is not finite."""
    if not MIN_EXAMPLES[type(result)] <= result.num_examples <= MAX_EXAMPLES:
        raise WireError("bad-message", f"num_examples must be between {MIN_EXAMPLES[type(result)]} and {MAX_EXAMPLES}")
    if result.version < 0:
        raise WireError("bad-message", "version must not be negative")
    metrics = result.metrics
    if len(metrics) > MAX_METRICS or any(len(name) > MAX_METRICS for name in metrics):
        raise WireError("bad-message", f"at most {MAX_METRICS} metrics with names of at most {MAX_METRICS} characters")
    if not all(math.isfinite(value) for value in metrics.values()):
        raise WireError("not-finite", "a metric is NaN or infinite", 422)


def _read(body: bytes, shapes: Shapes) -> tuple[object, dict[str, Array]]:
    """The metadata and the finite tensors of safetensors bytes."""
    header, offset = _header(body)
    metadata = header.pop("__metadata__", None)
    arrays = _arrays(header, memoryview(body)[offset:], shapes)
    if name := not_finite(arrays):
        raise WireError("not-finite", f"{name} holds NaN or infinity; the update is dropped", 422)
    return metadata, arrays


def _header(body: bytes) -> tuple[dict[str, Any], int]:
    """The JSON header of safetensors bytes and where the data starts."""
    if len(body) < 8:
        raise WireError("bad-tensors", "shorter than a safetensors file can be")
    (length,) = struct.unpack("<Q", body[:8])
    if length > MAX_HEADER or 8 + length > len(body):
        raise WireError("bad-tensors", f"the header claims {length} bytes; at most {MAX_HEADER}, and it must be there")
    try:
        header = json.loads(body[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise WireError("bad-tensors", "the header is not JSON") from error
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise WireError("bad-tensors", f"the header must be an object with at most {MAX_TENSORS} tensors")
    return header, 8 + length


def _arrays(header: Mapping[str, Any], data: memoryview, expected: Shapes) -> dict[str, Array]:
    """Float32 arrays that have the expected names and shapes and fill `data` exactly; copies, so the body can be let go."""
    spans: dict[str, tuple[int, int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, entry in header.items():
        match entry:
            case {"dtype": "F32", "shape": list(shape), "data_offsets": [int(begin), int(end)], **rest} if not rest:
                spans[name], shapes[name] = (begin, end), tuple(shape)
            case _:
                raise WireError("wrong-shape", f"{name[:100]!r} is not a float32 tensor with shape and offsets", 422)
    if problem := mismatch(shapes, expected):
        raise WireError("wrong-shape", problem[:500], 422)
    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position or end - begin != 4 * math.prod(expected[name]) or end > len(data):
            raise WireError("bad-tensors", f"{name} does not lie in the file as its shape says")
        position = end
    if position != len(data):
        raise WireError("bad-tensors", "bytes follow the last tensor")
    return {
        name: np.frombuffer(data[begin:end], dtype="<f4").reshape(expected[name]).astype(np.float32)
        for name, (begin, end) in spans.items()
    }
