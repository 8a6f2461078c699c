"""Bytes <-> messages, bounded before they are parsed; every failure is one `WireError`.

Control messages are JSON. An update is one safetensors file whose `__metadata__` holds the `Update` message under
`message`. Whatever bytes arrive, `decode` and `unpack` return a checked value or raise `WireError`, never anything else.
No pickle, no code, no sockets.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from edge_sdk import codec
from edge_sdk.adapters import Array, Arrays, Shapes, mismatch, not_finite, row_major
from edge_sdk.codec import Layout, Tensors
from edge_sdk.cohort import Masked
from edge_sdk.errors import DataError, WireError
from edge_sdk.judgments import Bytes
from edge_sdk.protocol import Evaluation, Judgment, Manifest, Result, Sample, Text, Trained, Update

JSON_TYPE = "application/json"
TENSORS_TYPE = "application/vnd.safetensors"
MASKED_TYPE = "application/vnd.tandem.masked+safetensors"
JUDGMENT_TYPE = "application/vnd.tandem.judgment+safetensors"
LINES_TYPE = "application/x-ndjson"
PROBLEM_TYPE = "application/problem+json"

MAX_JSON = 1 << 20  # a manifest lists every LoRA slot: about 100 bytes each
MAX_HEADER = 1 << 20  # safetensors allows 100 MB, which is a weapon
MAX_TENSORS = 4096
MAX_EXAMPLES = 10_000_000
MAX_METRICS = 64
MAX_TEXTS = 10_000  # of a sheet, or of a page of the feed
MAX_TEXT = 10_000  # characters of a synthetic text
MAX_SHEET = 1 << 24  # bytes of a sheet of texts, or of what is said of its tokens
MIN_EXAMPLES: dict[type, int] = {Update: 1, Evaluation: 0, Trained: 1, Judgment: 0}

NOT_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)  # what msgspec raises where JSON or a type is wrong

ITEM: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I8": np.dtype("i1")}

T = TypeVar("T")


class ByteEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the header of a judgment says of its one tensor."""

    dtype: Literal["U8"]
    shape: tuple[int, int]
    data_offsets: tuple[int, int]


class RingEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the header of a masked vector says of its one tensor."""

    dtype: Literal["U32"]
    shape: tuple[int]
    data_offsets: tuple[int, int]


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a safetensors header says of one tensor; whole numbers only, as the reference reader has it."""

    dtype: Literal["F32", "F16", "I8"]
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def encode(message: msgspec.Struct) -> bytes:
    return msgspec.json.encode(message)


def decode(body: bytes, kind: type[T], limit: int = MAX_JSON) -> T:
    """Raises: WireError: too long, not JSON, or not exactly a `kind`."""
    if len(body) > limit:
        raise WireError("too-large", f"a message may have {limit} bytes, this one has {len(body)}", 413)
    try:
        return msgspec.json.decode(body, type=kind)
    except NOT_JSON as error:
        reason = "".join(c if c.isprintable() else "?" for c in str(error)[:300])  # it may quote what it was sent
        raise WireError("bad-message", f"not a valid message: {reason}") from error
    except Exception as error:  # a struct's own bounds (SettingsError) reach us through msgspec
        raise WireError("bad-message", str(error)) from error


def pack(update: Update, delta: Arrays) -> bytes:
    """One safetensors file: tensors as `update.encoding` has them, and the message; the same input gives the same bytes.

    Raises:
        DataError: a number of the delta is none that the encoding holds.
    """
    return bytes(save(codec.encode(delta, update.encoding), metadata={"message": encode(update).decode()}))


def unpack(body: bytes, shapes: Callable[[Update], Shapes]) -> tuple[Update, dict[str, Array]]:
    """The message and the tensors of an update, after every check that needs no knowledge of the run's state.

    Args:
        shapes: names and shapes that the tensors of such an update must have; see `update_shapes`.

    Raises:
        WireError: `bad-message`, `wrong-part`, `bad-tensors` (not safetensors, or too many tensors), `wrong-shape` (names, shapes
            or types are not those of the adapter's slots in the message's encoding), `bad-codes` (int8 that no encoder makes),
            `not-finite` (NaN or infinity).
    """
    header, metadata, data = open_tensors(body)
    update = decode(message_of(metadata), Update)
    check_result(update)
    expected = shapes(update)
    tensors = _tensors(header, data, codec.layout(expected, update.encoding))
    try:
        return update, _finite(codec.decode(tensors, update.encoding, expected))
    except DataError as error:
        raise WireError("bad-codes", str(error), 422) from error


def update_shapes(manifest: Manifest) -> Callable[[Update], Shapes]:
    """What the tensors of an update of this run must look like; raises WireError `wrong-part` where the run forbids the part."""

    def shapes(update: Update) -> Shapes:
        try:
            return manifest.part(update.layers, update.rank).update_shapes()
        except DataError as error:
            raise WireError("wrong-part", str(error), 422) from error

    return shapes


def pack_judgment(judgment: Judgment, answer: Bytes) -> bytes:
    """One safetensors file: the bytes (n, width) of an answer, and the message."""
    return bytes(save({"answer": np.ascontiguousarray(answer)}, metadata={"message": encode(judgment).decode()}))


def unpack_judgment(body: bytes, shape: Callable[[Judgment], tuple[int, int]]) -> tuple[Judgment, Bytes]:
    """The message and the bytes of a judgment.

    Args:
        shape: what the answer must have; it raises WireError where there is no such sheet.

    Raises:
        WireError: `bad-message`, `bad-tensors`, `wrong-shape`, or what `shape` raises.
    """
    header, metadata, data = open_tensors(body)
    judgment = decode(message_of(metadata), Judgment)
    check_result(judgment)
    if header.keys() != {"answer"}:
        raise WireError("wrong-shape", "a judgment is one tensor of bytes, `answer`", 422)
    try:
        entry = msgspec.json.decode(header["answer"], type=ByteEntry)
    except NOT_JSON as error:
        raise WireError("wrong-shape", "`answer` is not a tensor of bytes with shape and offsets", 422) from error
    expected = shape(judgment)
    if entry.shape != expected:
        detail = f"this sheet needs an answer of shape {list(expected)}, not {list(entry.shape)}"
        raise WireError("wrong-shape", detail[:500], 422)
    if entry.data_offsets != (0, math.prod(expected)) or len(data) != math.prod(expected):
        raise WireError("bad-tensors", "`answer` does not lie in the file as its shape says")
    return judgment, np.frombuffer(data, np.uint8).reshape(expected).copy()


def pack_masked(masked: Masked, vector: NDArray[np.uint32]) -> bytes:
    """One safetensors file: a masked vector (length,), and the message."""
    return bytes(save({"vector": np.ascontiguousarray(vector)}, metadata={"message": encode(masked).decode()}))


def unpack_masked(body: bytes, length: int) -> tuple[Masked, NDArray[np.uint32]]:
    """The message and the masked vector (length,), which looks like noise: nothing else of it can be checked.

    Raises:
        WireError: `bad-message`, `bad-tensors` or `wrong-shape`.
    """
    header, metadata, data = open_tensors(body)
    masked = decode(message_of(metadata), Masked)
    if header.keys() != {"vector"}:
        raise WireError("wrong-shape", "a masked update is one tensor, `vector`", 422)
    try:
        entry = msgspec.json.decode(header["vector"], type=RingEntry)
    except NOT_JSON as error:
        raise WireError("wrong-shape", "`vector` is not a tensor of U32 with shape and offsets", 422) from error
    if entry.shape != (length,):
        raise WireError("wrong-shape", f"this cohort needs a vector of {length} elements, not {list(entry.shape)}"[:500], 422)
    if entry.data_offsets != (0, 4 * length) or len(data) != 4 * length:
        raise WireError("bad-tensors", "`vector` does not lie in the file as its shape says")
    return masked, np.frombuffer(data, "<u4").astype(np.uint32)


def pack_lines(lines: Iterable[msgspec.Struct]) -> bytes:
    """JSON lines."""
    return b"".join(encode(line) + b"\n" for line in lines)


def unpack_lines(body: bytes, kind: type[T]) -> list[T]:
    """Raises: WireError: too many lines, one too long, or one that is not exactly a `kind` with text of good length."""
    rows = body.splitlines()
    if len(rows) > MAX_TEXTS:
        raise WireError("too-large", f"at most {MAX_TEXTS} lines, these are {len(rows)}", 413)
    found = [decode(row, kind, 16 * MAX_TEXT) for row in rows]
    for line in found:
        if isinstance(line, Text | Sample):
            _check_text(line)
    return found


def _check_text(line: Text | Sample) -> None:
    if not 1 <= len(line.id) <= MAX_METRICS or not 0 < len(line.text) <= MAX_TEXT or not line.text.isprintable():
        raise WireError("bad-message", f"a text has 1 to {MAX_TEXT} printable characters, and an id of 1 to {MAX_METRICS}")
    if isinstance(line, Text) and (len(line.answer) > MAX_TEXT or not line.answer.isprintable()):
        raise WireError("bad-message", f"an answer has at most {MAX_TEXT} printable characters")
    if isinstance(line, Sample) and not all(0 <= p <= 1 for p in (*line.soft, line.quality)):
        raise WireError("bad-message", "soft labels and quality are probabilities")
    if isinstance(line, Sample) and not sum(line.soft) > 0:
        raise WireError("bad-message", "soft labels of nothing cannot be learned from")


def pack_adapter(arrays: Arrays) -> bytes:
    """A global adapter as PEFT's `adapter_model.safetensors`."""
    return bytes(save(row_major(arrays), metadata={"format": "pt"}))


def unpack_adapter(body: bytes, shapes: Shapes) -> dict[str, Array]:
    """Raises: WireError: as `unpack`, for the tensors."""
    header, _, data = open_tensors(body)
    return _finite(dict(_tensors(header, data, codec.layout(shapes, "fp32"))))


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
    if isinstance(result, Judgment) and len(result.covers) > MAX_METRICS:
        raise WireError("bad-message", f"a judgment covers at most {MAX_METRICS} classes")
    if isinstance(result, Update) and not (0 <= result.layers <= MAX_TENSORS and 0 <= result.rank <= MAX_TENSORS):
        raise WireError("bad-message", f"layers and rank must be between 0 and {MAX_TENSORS}")
    if result.version < 0:
        raise WireError("bad-message", "version must not be negative")
    metrics = result.metrics
    if len(metrics) > MAX_METRICS or any(len(name) > MAX_METRICS for name in metrics):
        raise WireError("bad-message", f"at most {MAX_METRICS} metrics with names of at most {MAX_METRICS} characters")
    if not all(math.isfinite(value) for value in metrics.values()):
        raise WireError("not-finite", "a metric is NaN or infinite", 422)


def open_tensors(body: bytes) -> tuple[dict[str, msgspec.Raw], dict[str, str], memoryview]:
    """The entries of safetensors bytes, not parsed yet, the metadata, and the data. Raises: WireError: `bad-tensors`."""
    header, offset = _header(body)
    try:
        metadata = msgspec.json.decode(header.pop("__metadata__", b"{}"), type=dict[str, str])
    except NOT_JSON as error:
        raise WireError("bad-tensors", "the metadata is not an object of strings") from error
    return header, metadata, memoryview(body)[offset:]


def message_of(metadata: Mapping[str, str]) -> bytes:
    """The JSON of the message beside the tensors. Raises: WireError: `bad-message`: there is none."""
    if "message" not in metadata:
        raise WireError("bad-message", "the tensors carry no `message` in their metadata")
    return metadata["message"].encode()


def _finite(arrays: dict[str, Array]) -> dict[str, Array]:
    if name := not_finite(arrays):
        raise WireError("not-finite", f"{name} holds NaN or infinity; the update is dropped", 422)
    return arrays


def _header(body: bytes) -> tuple[dict[str, msgspec.Raw], int]:
    """The JSON header of safetensors bytes, its values not parsed yet, and where the data starts."""
    if len(body) < 8:
        raise WireError("bad-tensors", "shorter than a safetensors file can be")
    (length,) = struct.unpack("<Q", body[:8])
    if length > MAX_HEADER or 8 + length > len(body):
        raise WireError("bad-tensors", f"the header claims {length} bytes; at most {MAX_HEADER}, and it must be there")
    try:
        header = msgspec.json.decode(body[8 : 8 + length], type=dict[str, msgspec.Raw])
    except NOT_JSON as error:
        raise WireError("bad-tensors", "the header is not a JSON object") from error
    if len(header) > MAX_TENSORS:
        raise WireError("bad-tensors", f"the header has {len(header)} entries, at most {MAX_TENSORS} are allowed")
    return header, 8 + length


def _tensors(header: Mapping[str, msgspec.Raw], data: memoryview, expected: Layout) -> Tensors:
    """Arrays that have the expected names, types and shapes and fill `data` exactly; read only, they lie in the body."""
    entries: dict[str, TensorEntry] = {}
    for name, raw in header.items():
        try:
            entries[name] = msgspec.json.decode(raw, type=TensorEntry)
        except NOT_JSON as error:
            raise WireError("wrong-shape", f"{name[:100]!r} is no tensor of numbers with shape and offsets", 422) from error
    shapes = {name: shape for name, (_, shape) in expected.items()}
    if problem := mismatch({name: entry.shape for name, entry in entries.items()}, shapes):
        raise WireError("wrong-shape", problem[:500], 422)
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if entry.dtype != expected[name][0]:
            raise WireError("wrong-shape", f"{name} is {entry.dtype}, and not {expected[name][0]}", 422)
        if begin != position or end - begin != ITEM[entry.dtype].itemsize * math.prod(entry.shape):
            raise WireError("bad-tensors", f"{name} does not lie in the file as its shape says")
        position = end
    if position != len(data):
        raise WireError("bad-tensors", "bytes follow the last tensor")
    tensors = {}
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        item = ITEM[entry.dtype]
        values = np.frombuffer(data[begin:end], item).reshape(entry.shape)
        tensors[name] = np.require(values, item.newbyteorder("="), "A")  # a copy only where a header left it askew
    return tensors
