"""Bytes and messages: what we write we read, and nothing hostile gets past the reader.

The invariant of all fuzzing here: whatever bytes arrive, `unpack` and `decode` return a checked value or raise
`WireError`, never anything else.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from safetensors.numpy import load, save

from edge_sdk import codec, wire
from edge_sdk.adapters import Array, Arrays
from edge_sdk.codec import Encoding
from edge_sdk.cohort import (
    MAX_MEMBERS,
    SEALED,
    SHARE,
    Advertise,
    Delivery,
    Join,
    Mask,
    Masked,
    Reveal,
    Roster,
    SealShares,
    Shares,
    Survivors,
    Terms,
    Unmask,
)
from edge_sdk.errors import SettingsError, WireError
from edge_sdk.protocol import (
    Ask,
    Enroll,
    Evaluate,
    Evaluation,
    Finished,
    Judgment,
    Line,
    Manifest,
    Mix,
    Predict,
    Problem,
    Receipt,
    Result,
    Sample,
    Status,
    Text,
    Train,
    Trained,
    Update,
    Wait,
    Withdraw,
    Withdrawal,
    Work,
)
from edge_sdk.softlabels import SoftLabels
from edge_sdk.training.batches import Training
from edge_sdk.wire import MAX_EXAMPLES, MAX_HEADER, MAX_JSON, MAX_METRICS, MAX_TENSORS, MAX_TEXT, MAX_TEXTS
from tests import factories, strategies
from tests.golden import regenerate

T = TypeVar("T")

SHAPES = factories.SPEC.shapes()
UPDATE = Update("device", 3, 16, {"loss": 0.25})
DELTA = factories.SPEC.start(1)
BODY = wire.pack(UPDATE, DELTA)
MESSAGE = wire.encode(UPDATE).decode()
TERMS = Terms("c-1", 4, 3, 40, 1.0, 64)
KEYS = Advertise("c-1", "d1", b"c" * 32, b"m" * 32)
DATA_SIZE = 4 * sum(math.prod(shape) for shape in SHAPES.values())
KINDS: tuple[Any, ...] = (
    Update,
    Evaluation,
    Trained,
    Judgment,
    Work,
    Ask,
    Enroll,
    Manifest,
    Receipt,
    Problem,
    Status,
    Line,
    Withdraw,
    Advertise,
    Shares,
    Masked,
    Reveal,
)


def framed(header: bytes, data: bytes = bytes(DATA_SIZE)) -> bytes:
    """A safetensors file with this header."""
    return struct.pack("<Q", len(header)) + header + data


def right_header() -> dict[str, Any]:
    """The header `unpack` likes, in the order of `SHAPES`."""
    header: dict[str, Any] = {"__metadata__": {"message": MESSAGE}}
    position = 0
    for name, shape in SHAPES.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    return header


Unpacked = tuple[Update, dict[str, Array]]


def check_unpacked(body: bytes) -> Unpacked | None:
    """`unpack` under the invariant: a value that keeps every promise, or None where it raised a WireError that does."""
    found = attempt(lambda: wire.unpack(body, lambda _: SHAPES))
    if isinstance(found, WireError):
        check_refusal(found, {"bad-tensors", "wrong-shape", "bad-codes", "not-finite", "bad-message"})
        return None
    update, arrays = found
    assert {name: array.shape for name, array in arrays.items()} == SHAPES
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays.values())
    assert 1 <= update.num_examples <= MAX_EXAMPLES
    assert update.version >= 0
    assert all(math.isfinite(value) for value in update.metrics.values())
    assert wire.decode(wire.encode(update), Update) == update
    return found


def check_decoded(body: bytes, kind: Any) -> None:
    """`decode` under the invariant: what it returns can be encoded again, what it raises can be told."""
    found = attempt(lambda: wire.decode(body, kind))
    if isinstance(found, WireError):
        check_refusal(found, {"bad-message"})
    else:
        assert wire.decode(wire.encode(found), kind) == found


def check_refusal(error: WireError, codes: set[str]) -> None:
    """A refusal has a known code and a client's status, and its sentence is short and can be sent."""
    assert error.code in codes
    assert 400 <= error.status < 500
    assert len(error.detail) <= 600
    assert wire.encode(Problem("", "", error.status, error.code, error.detail))


def attempt(call: Callable[[], T]) -> T | WireError:
    try:
        return call()
    except WireError as error:
        return error


def refusal(body: bytes) -> str:
    """The code `unpack` refuses with."""
    with pytest.raises(WireError) as caught:
        wire.unpack(body, lambda _: SHAPES)
    return caught.value.code


# Round trips ----------------------------------------------------------------------------------------------------------
@given(strategies.updates(), strategies.adapters(SHAPES))
def test_an_update_comes_back_bit_for_bit(update: Update, delta: dict[str, Array]) -> None:
    """unpack is the inverse of pack for every valid update, down to the sign of zero and the smallest number."""
    found, arrays = wire.unpack(wire.pack(update, delta), lambda _: SHAPES)

    assert found == update
    assert strategies.same(arrays, delta)


@given(strategies.updates(), strategies.adapters(SHAPES), st.permutations(list(SHAPES)))
def test_the_same_input_gives_the_same_bytes(update: Update, delta: dict[str, Array], order: list[str]) -> None:
    """A device that repeats its work sends the same bytes, in whatever order or memory layout its arrays are."""
    again = {name: np.asfortranarray(delta[name]) for name in order}

    assert wire.pack(update, again) == wire.pack(update, delta)


@given(strategies.adapters(SHAPES))
def test_an_adapter_comes_back_bit_for_bit(arrays: dict[str, Array]) -> None:
    """unpack_adapter is the inverse of pack_adapter, and any safetensors reader reads the same."""
    body = wire.pack_adapter(arrays)

    assert strategies.same(wire.unpack_adapter(body, SHAPES), arrays)
    assert strategies.same(load(body), arrays)


@given(strategies.updates(), strategies.adapters(SHAPES))
def test_no_update_exceeds_the_size_limit(update: Update, delta: dict[str, Array]) -> None:
    """A server that reads `size_limit` bytes never cuts an honest update."""
    assert len(wire.pack(update, delta)) <= wire.size_limit(SHAPES)


def test_size_limit_counts_values_header_and_length() -> None:
    """The limit is 4 bytes a value, the largest header and the 8 bytes of its length."""
    assert wire.size_limit({"a": (2, 6), "b": (4, 2)}) == 4 * (12 + 8) + MAX_HEADER + 8


@given(strategies.evaluations())
def test_an_evaluation_comes_back(evaluation: Evaluation) -> None:
    """decode is the inverse of encode for evaluations."""
    assert wire.decode(wire.encode(evaluation), Evaluation) == evaluation


@pytest.mark.parametrize(
    "work",
    [
        Train(2, "ab" * 32, Training(steps=3), SoftLabels(growth=8), 7),
        Train(0, "ab" * 32, Training(), None, 1),
        Train(0, "ab" * 32, Training(), None, 1, synthetic=Mix(7, 0.5, 4, 0.25), share=False),
        Train(0, "ab" * 32, Training(), None, 1, share=False, masked=True),
        Train(0, "ab" * 32, Training(), None, 1, upload="int8"),
        Join(2, TERMS),
        SealShares(2, Roster(TERMS, (KEYS,))),
        Mask(2, Delivery("c-1", "d1", {"d2": b"s" * SEALED})),
        Unmask(2, Survivors("c-1", ("d1", "d2"), ("d3",))),
        Predict(3, "ab" * 32, "cd" * 32, 1234, 7, "agree"),
        Predict(3, "ab" * 32, "cd" * 32, 1234, 7, "probabilities"),
        Evaluate(4, "cd" * 32),
        Wait(1.5),
        Finished(9, "ef" * 32),
    ],
    ids=lambda work: type(work).__name__,
)
def test_every_kind_of_work_comes_back(work: Work) -> None:
    """A device reads exactly the work the server wrote, told apart by its verb."""
    assert wire.decode(wire.encode(work), Work) == work  # type: ignore[arg-type]  # a union is fine for msgspec


def test_a_manifest_comes_back() -> None:
    """The manifest survives the wire with its task, adapter and bundle."""
    manifest = factories.manifest()

    assert wire.decode(wire.encode(manifest), Manifest) == manifest


# Golden bytes ---------------------------------------------------------------------------------------------------------
def test_the_golden_update_is_what_we_write() -> None:
    """The wire format has not changed by accident."""
    assert regenerate.update_bytes() == regenerate.UPDATE_FILE.read_bytes()


def test_the_golden_update_is_what_we_read() -> None:
    """The golden file holds exactly these values, so that a client in another language can compare itself."""
    update, arrays = wire.unpack(regenerate.UPDATE_FILE.read_bytes(), lambda _: regenerate.SPEC.shapes())

    assert update == Update("0123456789abcdef", 7, 12, {"loss": 0.5, "soft_examples": 64.0})
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "base_model.model.layer.0.query.lora_A.weight": [[0.5, -1.25, 3.0]],
        "base_model.model.layer.0.query.lora_B.weight": [[0.0], [-0.0078125]],
    }


def test_an_update_id_is_a_hash_of_sender_version_and_bytes() -> None:
    """The id is sha256 of the three, one a line, and a change of any of them changes it."""
    expected = hashlib.sha256(b"device\n3\n" + b"ab" * 32).hexdigest()

    assert wire.update_id("device", 3, "ab" * 32) == expected
    assert len({expected, wire.update_id("other", 3, "ab" * 32), wire.update_id("device", 4, "ab" * 32)}) == 3
    assert wire.update_id("device", 3, "cd" * 32) != expected


# Encodings ------------------------------------------------------------------------------------------------------------
CODED: dict[Encoding, Update] = {
    "int8": msgspec.structs.replace(UPDATE, encoding="int8"),
    "fp16": msgspec.structs.replace(UPDATE, encoding="fp16"),
}


def coded(encoding: Encoding, **changes: NDArray[Any] | None) -> bytes:
    """An update in this encoding, of which some tensors are others, or more, or None for not there."""
    tensors = {**codec.encode(DELTA, encoding), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return bytes(save(kept, metadata={"message": wire.encode(CODED[encoding]).decode()}))


@pytest.mark.parametrize("encoding", CODED)
def test_a_coded_update_comes_back_rounded(encoding: Encoding) -> None:
    """What is read is what `codec` says the other side reads; the same input gives the same bytes."""
    body = wire.pack(CODED[encoding], DELTA)
    update, arrays = wire.unpack(body, lambda _: SHAPES)

    assert update == CODED[encoding]
    assert strategies.same(arrays, codec.decode(codec.encode(DELTA, encoding), encoding, SHAPES))
    assert body == coded(encoding) == wire.pack(update, {name: np.asfortranarray(DELTA[name]) for name in reversed(SHAPES)})


def with_last(array: NDArray[Any], value: float) -> NDArray[Any]:
    """The array, with another last number."""
    array = array.copy()
    array[-1] = value
    return array


CODES, SCALES = codec.encode(DELTA, "int8")["values"], codec.encode(DELTA, "int8")["scales"]
HALVES = codec.encode(DELTA, "fp16")["values"]


@pytest.mark.parametrize(
    ("encoding", "changes", "code"),
    [
        ("int8", {"values": CODES[:-1]}, "wrong-shape"),
        ("int8", {"values": np.append(CODES, CODES[:1])}, "wrong-shape"),
        ("int8", {"values": CODES[None]}, "wrong-shape"),
        ("int8", {"values": CODES.astype(np.float32)}, "wrong-shape"),
        ("int8", {"values": CODES.astype(np.uint8)}, "wrong-shape"),
        ("int8", {"values": None}, "wrong-shape"),
        ("int8", {"scales": SCALES[:-1]}, "wrong-shape"),
        ("int8", {"scales": np.append(SCALES, SCALES[:1])}, "wrong-shape"),
        ("int8", {"scales": SCALES.astype(np.float16)}, "wrong-shape"),
        ("int8", {"scales": np.zeros(0, np.float32)}, "wrong-shape"),
        ("int8", {"scales": None}, "wrong-shape"),
        ("int8", {"more": np.zeros(1, np.int8)}, "wrong-shape"),
        ("int8", dict(DELTA), "wrong-shape"),
        ("int8", {"scales": with_last(SCALES, math.nan)}, "not-finite"),
        ("int8", {"scales": with_last(SCALES, math.inf)}, "not-finite"),
        ("int8", {"scales": np.full_like(SCALES, 3e38)}, "not-finite"),
        ("int8", {"scales": with_last(SCALES, -1e-9)}, "bad-codes"),
        ("int8", {"scales": with_last(SCALES, -math.inf)}, "bad-codes"),
        ("int8", {"values": with_last(CODES, -128)}, "bad-codes"),
        ("fp16", {"values": with_last(HALVES, math.nan)}, "not-finite"),
        ("fp16", {"values": with_last(HALVES, -math.inf)}, "not-finite"),
        ("fp16", {"values": HALVES[:-1]}, "wrong-shape"),
        ("fp16", {"values": HALVES.view(np.int8)}, "wrong-shape"),
        ("fp16", {"values": HALVES.astype(np.float32)}, "wrong-shape"),
        ("fp16", {"scales": SCALES}, "wrong-shape"),
    ],
)
def test_what_no_encoder_makes_is_refused(encoding: Encoding, changes: dict[str, Any], code: str) -> None:
    """Too few or too many codes or scales, other types, other tensors, scales that are no sizes."""
    assert refusal(coded(encoding, **changes)) == code


@pytest.mark.parametrize("said", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("sent", ["fp32", "fp16", "int8"])
def test_the_message_says_the_encoding(sent: Encoding, said: Encoding) -> None:
    """Tensors of another encoding than the message names are refused, so no byte is read as what it is not."""
    message = wire.encode(msgspec.structs.replace(UPDATE, encoding=said)).decode()
    body = bytes(save(codec.encode(DELTA, sent), metadata={"message": message}))

    assert (check_unpacked(body) is not None) == (sent == said)
    assert sent == said or refusal(body) == "wrong-shape"


@pytest.mark.parametrize("encoding", ["int4", "FP16", "", None, 8])
def test_an_unknown_encoding_is_refused(encoding: object) -> None:
    """There are three."""
    message = json.dumps(json.loads(MESSAGE) | {"encoding": encoding})

    assert refusal(bytes(save(codec.encode(DELTA, "int8"), metadata={"message": message}))) == "bad-message"


@strategies.fuzzing
@given(st.data(), st.sampled_from(sorted(CODED)))
def test_damaged_coded_updates_are_refused_or_valid(data: st.DataObject, encoding: Encoding) -> None:
    """The invariant holds for coded updates with bytes changed, lost or added."""
    check_unpacked(data.draw(strategies.damaged(wire.pack(CODED[encoding], DELTA))))


# Fuzzing --------------------------------------------------------------------------------------------------------------
@strategies.fuzzing
@given(st.binary(max_size=600))
def test_random_bytes_are_refused_or_valid(body: bytes) -> None:
    """The invariant holds for any bytes, bare and behind an honest header length."""
    check_unpacked(body)
    check_unpacked(framed(body))


@strategies.fuzzing
@given(strategies.damaged(BODY))
def test_damaged_updates_are_refused_or_valid(body: bytes) -> None:
    """The invariant holds for valid updates with bytes changed, lost or added."""
    check_unpacked(body)


@given(st.binary(min_size=DATA_SIZE, max_size=DATA_SIZE))
def test_any_values_are_read_as_they_are_or_refused(data: bytes) -> None:
    """Whatever the data says, it is read bit for bit, and refused exactly where a value is NaN or infinite."""
    values = np.frombuffer(data, "<f4")
    found = check_unpacked(framed(json.dumps(right_header()).encode(), data))

    assert (found is not None) == bool(np.isfinite(values).all())
    assert found is None or b"".join(array.tobytes() for array in found[1].values()) == data


@strategies.fuzzing
@given(strategies.headers(SHAPES, MESSAGE), st.integers(-8, 8))
def test_crafted_headers_are_refused_or_agree_with_the_reference(entries: list[tuple[str, Any]], surplus: int) -> None:
    """Of generated headers we accept only what the reference safetensors reader accepts, and read the same from it."""
    body = framed(strategies.header_bytes(entries), bytes(DATA_SIZE + surplus if abs(surplus) > 6 else DATA_SIZE))
    found = check_unpacked(body)

    if found is not None and len({name for name, _ in entries}) == len(entries):
        assert strategies.same(found[1], load(body))


@pytest.mark.parametrize("spaces", range(9))
def test_tensors_lie_in_the_body_unless_its_header_left_them_askew(spaces: int) -> None:
    """Other libraries need aligned numbers, and nobody may write into what arrived."""
    header = json.dumps(right_header()).encode()
    header += b" " * (-len(header) % 8 + spaces)
    read = wire.unpack(framed(header, BODY[-DATA_SIZE:]), lambda _: SHAPES)[1]

    assert all(array.flags.aligned and array.dtype == np.float32 for array in read.values())
    assert [array.flags.writeable for array in read.values()] == [spaces % 4 > 0] * len(SHAPES)
    assert strategies.same(read, wire.unpack(framed(header.rstrip(), BODY[-DATA_SIZE:]), lambda _: SHAPES)[1])


def test_an_untouched_header_is_accepted() -> None:
    """The header the fuzzing starts from is a good one, so the fuzzing is not vacuous."""
    found = check_unpacked(framed(json.dumps(right_header()).encode()))

    assert found is not None
    assert found[0] == UPDATE
    assert set(found[1]) == set(SHAPES)


@strategies.fuzzing
@given(st.binary(max_size=200), st.sampled_from(KINDS))
@example(b"[" * 100_000, Update)
@example(b'{"device":' + b"[" * 100_000, Ask)
@example(b'{"device":"\\ud800","can_train":true}', Ask)
@example(b'{"device":"\xff\xfe","can_train":true}', Ask)
@example(b'{"id":"a","version":' + b"9" * 5000 + b"}", Receipt)
@example(b'{"verb":"wait","seconds":1e999}', Work)
@example(b'{"verb":"wait","seconds":NaN}', Work)
def test_random_messages_are_refused_or_valid(body: bytes, kind: Any) -> None:
    """The invariant holds for control messages of every kind."""
    check_decoded(body, kind)


@given(st.sampled_from([UPDATE, Evaluation("d", 1, 0, {}), Ask("d", True), Receipt("x", 1), factories.manifest()]), st.data())
def test_damaged_messages_are_refused_or_valid(message: msgspec.Struct, data: st.DataObject) -> None:
    """The invariant holds for valid control messages with bytes changed, lost or added."""
    check_decoded(data.draw(strategies.damaged(wire.encode(message))), type(message))


@given(st.dictionaries(st.sampled_from(["device", "version", "num_examples", "metrics", "result"]), strategies.json_values))
def test_messages_of_any_json_are_refused_or_valid(fields: dict[str, Any]) -> None:
    """The invariant holds where every field is there and any of them has any JSON value."""
    right = {"result": "update", "device": "d", "version": 1, "num_examples": 1, "metrics": {"loss": 1.0}}

    check_decoded(json.dumps(right | fields).encode(), Update)


# Single attacks on the header, with the code each is refused by --------------------------------------------------------
@pytest.mark.parametrize("length", [MAX_HEADER + 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_bomb_is_refused_by_its_length(length: int) -> None:
    """A header over the limit is refused whatever is in it, before it is parsed: no JSON stands behind these lengths."""
    with pytest.raises(WireError, match=f"the header claims {length} bytes") as caught:
        wire.unpack(struct.pack("<Q", length) + b"[" * (MAX_HEADER + 1), lambda _: SHAPES)
    assert caught.value.code == "bad-tensors"


def test_a_header_of_the_largest_size_is_read() -> None:
    """The limit itself is allowed: an honest header blown up with spaces to the last byte."""
    header = json.dumps(right_header()).encode()

    assert wire.unpack(framed(header.ljust(MAX_HEADER)), lambda _: SHAPES)[0] == UPDATE
    assert refusal(framed(header.ljust(MAX_HEADER + 1))) == "bad-tensors"


@pytest.mark.parametrize("size", range(8))
def test_less_than_a_length_is_refused(size: int) -> None:
    """A body too short for its own length field is no safetensors file."""
    assert refusal(BODY[:size]) == "bad-tensors"


@pytest.mark.parametrize(
    "header", [b"[" * 500_000, b'{"a":' * 100_000, b'{"a":' + b"[" * 900_000], ids=["list", "object", "mixed"]
)
def test_deep_nesting_is_refused(header: bytes) -> None:
    """A header nested deeper than any stack raises WireError, not RecursionError."""
    assert refusal(framed(header)) == "bad-tensors"


@pytest.mark.parametrize(
    "header",
    [b"", b"null", b"[]", b"5", b'"text"', b"{", b"{}{}", b"\xff\xfe", json.dumps(right_header()).encode("utf-16"), b'{"a":NaN}'],
)
def test_what_is_not_one_json_object_in_utf8_is_refused(header: bytes) -> None:
    """The header must be an object in UTF-8, of strict JSON, with nothing after it."""
    assert refusal(framed(header)) == "bad-tensors"


def test_too_many_tensors_are_refused() -> None:
    """A header with thousands of names is refused before its entries are looked at."""
    header = {f"t{i}": 0 for i in range(MAX_TENSORS + 1)}

    assert refusal(framed(json.dumps(header).encode())) == "bad-tensors"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "F64"),
        ("dtype", "BF16"),
        ("dtype", None),
        ("shape", [6, 2]),
        ("shape", [2.0, 6.0]),
        ("shape", [2, True]),
        ("shape", [-2, -6]),
        ("shape", [[2, 6]]),
        ("shape", [2, 6, 1]),
        ("shape", [2**64, 6]),
        ("shape", "26"),
        ("data_offsets", [0.0, 48.0]),
        ("data_offsets", [False, 48]),
        ("data_offsets", [0]),
        ("data_offsets", [0, 24, 48]),
        ("data_offsets", {"0": 48}),
        ("strides", [6, 1]),
    ],
)
def test_an_entry_of_another_form_is_refused(field: str, value: object) -> None:
    """Type, shape and offsets are F32, the slot's shape and two whole numbers; booleans and floats are no numbers here."""
    header = right_header()
    header[next(iter(SHAPES))][field] = value

    assert refusal(framed(json.dumps(header).encode())) == "wrong-shape"


@pytest.mark.parametrize("span", [[-48, 0], [0, 44], [0, 52], [4, 52], [48, 0], [0, 2**63], [2**64, 2**64 + 48], [48, 80]])
def test_a_tensor_that_lies_elsewhere_is_refused(span: list[int]) -> None:
    """Negative, overlapping, gaping, reversed and huge spans are refused: tensors fill the data exactly, in order."""
    header = right_header()
    header[next(iter(SHAPES))]["data_offsets"] = span

    assert refusal(framed(json.dumps(header).encode())) == "bad-tensors"


@pytest.mark.parametrize("size", [0, DATA_SIZE - 1, DATA_SIZE + 1, 2 * DATA_SIZE])
def test_data_of_another_size_is_refused(size: int) -> None:
    """Missing and trailing bytes are refused."""
    assert refusal(framed(json.dumps(right_header()).encode(), bytes(size))) == "bad-tensors"


def test_a_missing_and_a_foreign_tensor_are_named() -> None:
    """The refusal says which name is missing and which is not the adapter's, so the sender can be mended."""
    header = right_header()
    first = next(iter(SHAPES))
    header["stranger"] = header.pop(first)

    with pytest.raises(WireError, match="stranger") as caught:
        wire.unpack(framed(json.dumps(header).encode()), lambda _: SHAPES)
    assert caught.value.code == "wrong-shape"
    assert first in caught.value.detail


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    """One NaN or infinity anywhere refuses the whole update, and the tensor is named."""
    last = list(SHAPES)[-1]
    delta = {name: array.copy() for name, array in DELTA.items()}
    delta[last][-1, -1] = value

    with pytest.raises(WireError, match=last) as caught:
        wire.unpack(wire.pack(UPDATE, delta), lambda _: SHAPES)
    assert (caught.value.code, caught.value.status) == ("not-finite", 422)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"message": 5}, {"message": None}, [], "message", 5])
def test_an_update_without_its_message_is_refused(metadata: object) -> None:
    """Tensors alone are no update, and metadata that is not an object of strings is no safetensors."""
    header = right_header() | {"__metadata__": metadata}

    assert refusal(framed(json.dumps(header).encode())) in {"bad-message", "bad-tensors"}


def test_a_message_with_a_lone_surrogate_is_refused() -> None:
    """A string that no UTF-8 can say is refused instead of failing later, when somebody prints it."""
    header = json.dumps(right_header() | {"__metadata__": {"message": "\ud800"}})

    assert "\\ud800" in header
    assert refusal(framed(header.encode())) == "bad-tensors"


def test_metadata_of_an_adapter_does_not_matter() -> None:
    """Adapters of other tools carry other metadata, or none, and are read all the same."""
    assert strategies.same(wire.unpack_adapter(save(dict(DELTA)), SHAPES), DELTA)
    assert strategies.same(wire.unpack_adapter(save(dict(DELTA), {"by": "peft"}), SHAPES), DELTA)


# Limits of messages ---------------------------------------------------------------------------------------------------
def test_a_message_over_the_limit_is_not_parsed() -> None:
    """The limit is checked before the content: a long body is `too-large` even where it is no JSON, one byte less is parsed."""
    ask = wire.encode(Ask("d", True))

    assert wire.decode(ask.ljust(MAX_JSON), Ask) == Ask("d", True)
    for body in (ask.ljust(MAX_JSON + 1), b"[" * (MAX_JSON + 1)):
        with pytest.raises(WireError) as caught:
            wire.decode(body, Ask)
        assert (caught.value.code, caught.value.status) == ("too-large", 413)


def test_a_limit_can_be_lowered() -> None:
    """A caller's own limit counts, to the byte."""
    body = wire.encode(Ask("d", True))

    assert wire.decode(body, Ask, limit=len(body)) == Ask("d", True)
    with pytest.raises(WireError, match="too-large"):
        wire.decode(body, Ask, limit=len(body) - 1)


def test_unknown_and_missing_fields_are_refused() -> None:
    """A message has exactly the fields of its kind."""
    for body in (b'{"device":"d","can_train":true,"x":1}', b'{"device":"d"}', b'{"device":"d","can_train":1}'):
        with pytest.raises(WireError, match="bad-message"):
            wire.decode(body, Ask)


def test_settings_out_of_bounds_are_a_wire_error() -> None:
    """Bounds of the values inside a message are part of the protocol: breaking them is `bad-message`, with the reason."""
    body = wire.encode(Train(0, "", Training(), None, 0)).replace(b'"steps":10', b'"steps":0')

    with pytest.raises(WireError, match=r"training\.steps must be") as caught:
        wire.decode(body, Train)
    assert caught.value.code == "bad-message"


def test_a_long_reason_is_cut() -> None:
    """What a refusal repeats of the input is bounded."""
    body = b'{"device":"d","can_train":true,"' + b"x" * 100_000 + b'":1}'

    with pytest.raises(WireError) as caught:
        wire.decode(body, Ask)
    assert len(caught.value.detail) < 400


@pytest.mark.parametrize(
    "result",
    [
        Update("d", 0, 1, {}),
        Update("d", 0, MAX_EXAMPLES, {"n" * MAX_METRICS: -1e308}),
        Evaluation("d", 0, 0, {f"m{i}": 0.0 for i in range(MAX_METRICS)}),
        Trained("d", 0, 1, {"accuracy": 1.0}),
        Judgment("d", 0, 0, {}, tuple(range(MAX_METRICS))),
    ],
)
def test_results_at_their_limits_are_fine(result: Result) -> None:
    """The bounds themselves are allowed; an evaluation may rest on no example at all, an update may not."""
    wire.check_result(result)

    assert wire.decode(wire.encode(result), type(result)) == result


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (Update("d", 0, 0, {}), "bad-message"),
        (Update("d", 0, MAX_EXAMPLES + 1, {}), "bad-message"),
        (Update("d", -1, 1, {}), "bad-message"),
        (Evaluation("d", 0, -1, {}), "bad-message"),
        (Trained("d", 0, 0, {}), "bad-message"),
        (Trained("d", 0, 1, {"accuracy": math.nan}), "not-finite"),
        (Judgment("d", 0, 0, {}, tuple(range(MAX_METRICS + 1))), "bad-message"),
        (Update("d", 0, 1, {"n" * (MAX_METRICS + 1): 0.0}), "bad-message"),
        (Update("d", 0, 1, {f"m{i}": 0.0 for i in range(MAX_METRICS + 1)}), "bad-message"),
        (Update("d", 0, 1, {"loss": math.nan}), "not-finite"),
        (Evaluation("d", 0, 1, {"loss": math.inf}), "not-finite"),
    ],
)
def test_results_beyond_their_limits_are_refused(result: Result, code: str) -> None:
    """Counts, versions, names and numbers out of bounds are refused by their own code."""
    with pytest.raises(WireError) as caught:
        wire.check_result(result)
    assert caught.value.code == code


def test_unpack_checks_the_message_too() -> None:
    """An update whose tensors are good but whose counts are not is refused."""
    delta: Arrays = DELTA

    assert refusal(wire.pack(Update("d", 0, 0, {}), delta)) == "bad-message"
    assert refusal(wire.pack(Update("d", -1, 1, {}), delta)) == "bad-message"


# Judgments ------------------------------------------------------------------------------------------------------------
JUDGMENT = Judgment("device", 3, 16, {"accuracy": 0.75}, (0, 1))
ANSWER = np.array([[255, 0], [128, 127], [1, 254]], np.uint8)
JUDGED = wire.pack_judgment(JUDGMENT, ANSWER)
RIGHT = {"dtype": "U8", "shape": [3, 2], "data_offsets": [0, 6]}


def judged(entry: object, data: bytes = ANSWER.tobytes(), message: str = wire.encode(JUDGMENT).decode(), **more: Any) -> bytes:
    """A judgment with this entry for its answer."""
    return framed(json.dumps({"__metadata__": {"message": message}, "answer": entry, **more}).encode(), data)


def check_judgment(body: bytes) -> tuple[Judgment, Any] | None:
    """`unpack_judgment` under the invariant: a checked value, or None where it raised a WireError that can be told."""
    found = attempt(lambda: wire.unpack_judgment(body, lambda _: (3, 2)))
    if isinstance(found, WireError):
        check_refusal(found, {"bad-tensors", "wrong-shape", "not-finite", "bad-message"})
        return None
    judgment, answer = found
    wire.check_result(judgment)
    assert answer.dtype == np.uint8
    assert answer.shape == (3, 2)
    assert wire.decode(wire.encode(judgment), Judgment) == judgment
    return found


def refused(body: bytes, shape: tuple[int, int] = (3, 2)) -> str:
    """The code `unpack_judgment` refuses with."""
    with pytest.raises(WireError) as caught:
        wire.unpack_judgment(body, lambda _: shape)
    check_refusal(caught.value, {caught.value.code})
    return caught.value.code


@given(strategies.judgments(), hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=5)))
def test_a_judgment_comes_back_byte_for_byte(judgment: Judgment, answer: NDArray[np.uint8]) -> None:
    """unpack_judgment is the inverse of pack_judgment; the bytes are the same every time, and any safetensors reader's."""
    body = wire.pack_judgment(judgment, answer)
    asked: list[Judgment] = []

    def shape(told: Judgment) -> tuple[int, int]:
        asked.append(told)
        return answer.shape[0], answer.shape[1]

    found, read = wire.unpack_judgment(body, shape)
    assert (found, asked) == (judgment, [judgment])
    assert strategies.same({"answer": read}, {"answer": answer})
    assert read.flags.writeable  # its own memory, not the request's
    assert wire.pack_judgment(judgment, np.asfortranarray(answer)) == body
    if answer.size:  # the reference reader divides by the size
        assert strategies.same(load(body), {"answer": answer})


def test_a_judgment_in_bytes() -> None:
    """The form on the wire is a header of U8 and n * width bytes, row by row; a client in another language writes just this."""
    assert JUDGED[-6:] == bytes([255, 0, 128, 127, 1, 254])
    header = json.loads(JUDGED[8 : 8 + struct.unpack("<Q", JUDGED[:8])[0]])
    message = json.loads(header.pop("__metadata__")["message"])

    assert header == {"answer": RIGHT}
    assert message == {
        "result": "judgment",
        "device": "device",
        "version": 3,
        "num_examples": 16,
        "metrics": {"accuracy": 0.75},
        "covers": [0, 1],
    }
    found = check_judgment(judged(RIGHT))
    assert found is not None
    assert found[0] == JUDGMENT
    assert found[1].tolist() == ANSWER.tolist()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (save({"answer": ANSWER}), "bad-message"),
        (save({"answer": ANSWER}, {"format": "pt"}), "bad-message"),
        (judged(RIGHT, message=MESSAGE), "bad-message"),  # of an update
        (judged(RIGHT, message="{"), "bad-message"),
        (save({"answers": ANSWER}, {"message": wire.encode(JUDGMENT).decode()}), "wrong-shape"),
        (save({}, {"message": wire.encode(JUDGMENT).decode()}), "wrong-shape"),
        (judged(RIGHT, more=RIGHT), "wrong-shape"),
        (save({"answer": ANSWER.astype(np.float32)}, {"message": wire.encode(JUDGMENT).decode()}), "wrong-shape"),
        (save({"answer": ANSWER.view(np.int8)}, {"message": wire.encode(JUDGMENT).decode()}), "wrong-shape"),
        (save({"answer": ANSWER.T.copy()}, {"message": wire.encode(JUDGMENT).decode()}), "wrong-shape"),
        (save({"answer": ANSWER.reshape(6)}, {"message": wire.encode(JUDGMENT).decode()}), "wrong-shape"),
        (save({"answer": ANSWER[:2]}, {"message": wire.encode(JUDGMENT).decode()}), "wrong-shape"),
        (judged(RIGHT | {"strides": [2, 1]}), "wrong-shape"),
        (judged(RIGHT | {"shape": [-3, -2]}), "wrong-shape"),
        (judged(RIGHT | {"shape": [10**400, 10**400]}), "wrong-shape"),
        (judged(RIGHT | {"data_offsets": [0, 5]}), "bad-tensors"),
        (judged(RIGHT | {"data_offsets": [1, 7]}, bytes(7)), "bad-tensors"),
        (judged(RIGHT | {"data_offsets": [-6, 0]}), "bad-tensors"),
        (judged(RIGHT, bytes(5)), "bad-tensors"),
        (judged(RIGHT, bytes(7)), "bad-tensors"),
        (JUDGED + b"\0", "bad-tensors"),
        (JUDGED[:7], "bad-tensors"),
        (b"", "bad-tensors"),
    ],
)
def test_what_is_no_judgment_is_refused(body: bytes, code: str) -> None:
    """Message, name, type, shape and place of the answer are as they must be, or the code says which is not."""
    assert refused(body) == code


def test_an_answer_to_another_sheet_is_refused() -> None:
    """What the sheet needs decides; where there is no such sheet, the refusal is the caller's own."""

    def unknown(_: Judgment) -> tuple[int, int]:
        raise WireError("unknown-sheet", "no sheet 3", 409)

    assert refused(JUDGED, (3, 1)) == refused(JUDGED, (4, 2)) == refused(JUDGED, (2, 3)) == "wrong-shape"
    with pytest.raises(WireError) as caught:
        wire.unpack_judgment(JUDGED, unknown)
    assert (caught.value.code, caught.value.status) == ("unknown-sheet", 409)


@pytest.mark.parametrize(
    ("judgment", "code"),
    [
        (Judgment("d", 0, 1, {}, tuple(range(MAX_METRICS + 1))), "bad-message"),
        (Judgment("d", 0, -1, {}), "bad-message"),
        (Judgment("d", -1, 1, {}), "bad-message"),
        (Judgment("d", 0, MAX_EXAMPLES + 1, {}), "bad-message"),
        (Judgment("d", 0, 1, {"n" * (MAX_METRICS + 1): 0.0}), "bad-message"),
    ],
)
def test_a_judgment_out_of_bounds_is_refused(judgment: Judgment, code: str) -> None:
    """Counts, versions, names and covers have bounds; the most covers, and no example at all, are fine."""
    assert refused(wire.pack_judgment(judgment, ANSWER)) == code
    most = Judgment("d", 0, 0, {}, tuple(range(MAX_METRICS)))
    assert wire.unpack_judgment(wire.pack_judgment(most, ANSWER), lambda _: (3, 2))[0] == most


@strategies.fuzzing
@given(st.binary(max_size=400))
def test_random_bytes_are_no_judgment_or_a_valid_one(body: bytes) -> None:
    """The invariant holds for any bytes, bare and behind an honest header length."""
    check_judgment(body)
    check_judgment(framed(body, ANSWER.tobytes()))


@strategies.fuzzing
@given(strategies.damaged(JUDGED))
def test_damaged_judgments_are_refused_or_valid(body: bytes) -> None:
    """The invariant holds for valid judgments with bytes changed, lost or added."""
    check_judgment(body)


@strategies.fuzzing
@given(
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "more"]), strategies.json_values, max_size=2),
    st.dictionaries(st.sampled_from(["device", "version", "num_examples", "metrics", "covers"]), strategies.json_values),
)
@example({}, {"covers": [10**400]})
@example({"shape": [10**300, 10**300]}, {})
def test_judgments_of_any_json_are_refused_or_valid(entry: dict[str, Any], fields: dict[str, Any]) -> None:
    """The invariant holds where any field of the entry or of the message has any JSON value."""
    check_judgment(judged(RIGHT | entry, message=json.dumps(msgspec.to_builtins(JUDGMENT) | fields)))


# Masked vectors -------------------------------------------------------------------------------------------------------
MASKED = Masked("c-1", "d1")
VECTOR = np.array([1, 2**32 - 1, 0x04030201], np.uint32)
PACKED = wire.pack_masked(MASKED, VECTOR)
RING = {"dtype": "U32", "shape": [3], "data_offsets": [0, 12]}


def masked(entry: object, data: bytes = VECTOR.tobytes(), message: str = wire.encode(MASKED).decode(), **more: Any) -> bytes:
    """A masked vector with this entry for its tensor."""
    return framed(json.dumps({"__metadata__": {"message": message}, "vector": entry, **more}).encode(), data)


def check_masked(body: bytes) -> tuple[Masked, Any] | None:
    """`unpack_masked` under the invariant: a checked value, or None where it raised a WireError that can be told."""
    found = attempt(lambda: wire.unpack_masked(body, 3))
    if isinstance(found, WireError):
        check_refusal(found, {"bad-tensors", "wrong-shape", "bad-message"})
        return None
    message, vector = found
    assert vector.dtype == np.uint32
    assert vector.shape == (3,)
    assert wire.decode(wire.encode(message), Masked) == message
    return found


def refused_vector(body: bytes, length: int = 3) -> str:
    """The code `unpack_masked` refuses with."""
    with pytest.raises(WireError) as caught:
        wire.unpack_masked(body, length)
    check_refusal(caught.value, {caught.value.code})
    return caught.value.code


names = st.from_regex(r"\A[A-Za-z0-9-]{1,64}\Z")


@given(st.builds(Masked, names, names), hnp.arrays(np.uint32, st.integers(0, 9)))
def test_a_masked_vector_comes_back_bit_for_bit(message: Masked, vector: NDArray[np.uint32]) -> None:
    """unpack_masked is the inverse of pack_masked; the bytes are the same every time, and any safetensors reader's."""
    body = wire.pack_masked(message, vector)
    found, read = wire.unpack_masked(body, len(vector))

    assert found == message
    assert strategies.same({"vector": read}, {"vector": vector})
    assert strategies.same(load(body), {"vector": vector})
    assert read.flags.writeable  # its own memory, not the request's
    assert wire.pack_masked(message, np.repeat(vector, 2)[::2]) == body


def test_a_masked_vector_in_bytes() -> None:
    """Little-endian, 4 bytes an element, one after the other at the end of the file."""
    assert PACKED[-12:] == bytes.fromhex("01000000 ffffffff 01020304")
    assert check_masked(masked(RING)) is not None


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (masked(RING, message="{"), "bad-message"),
        (masked(RING, message=wire.encode(KEYS).decode()), "bad-message"),
        (masked(RING, message='{"result":"masked","cohort":"c-1","device":"d1","weight":7}'), "bad-message"),
        (masked(RING, message='{"result":"masked","cohort":"c-1","device":"d 1"}'), "bad-message"),
        (masked(RING, message='{"result":"masked","cohort":"","device":"d1"}'), "bad-message"),
        (framed(json.dumps({"vector": RING}).encode(), VECTOR.tobytes()), "bad-message"),
        (masked(RING, more=RING), "wrong-shape"),
        (save({"answer": VECTOR}, {"message": wire.encode(MASKED).decode()}), "wrong-shape"),
        (save({}, {"message": wire.encode(MASKED).decode()}), "wrong-shape"),
        (save({"vector": VECTOR.astype(np.float32)}, {"message": wire.encode(MASKED).decode()}), "wrong-shape"),
        (save({"vector": VECTOR.astype(np.int32)}, {"message": wire.encode(MASKED).decode()}), "wrong-shape"),
        (save({"vector": VECTOR.astype(np.uint64)}, {"message": wire.encode(MASKED).decode()}), "wrong-shape"),
        (save({"vector": VECTOR[:, None]}, {"message": wire.encode(MASKED).decode()}), "wrong-shape"),
        (wire.pack_masked(MASKED, VECTOR[:2]), "wrong-shape"),
        (wire.pack_masked(MASKED, np.append(VECTOR, VECTOR)), "wrong-shape"),
        (masked(RING | {"strides": [4]}), "wrong-shape"),
        (masked(RING | {"shape": [10**400]}), "wrong-shape"),
        (masked(RING | {"shape": [3.0]}), "wrong-shape"),
        (masked("vector"), "wrong-shape"),
        (masked(RING | {"data_offsets": [0, 11]}), "bad-tensors"),
        (masked(RING | {"data_offsets": [4, 16]}, bytes(16)), "bad-tensors"),
        (masked(RING | {"data_offsets": [-12, 0]}), "bad-tensors"),
        (masked(RING, bytes(11)), "bad-tensors"),
        (masked(RING, bytes(13)), "bad-tensors"),
        (PACKED + b"\0", "bad-tensors"),
        (PACKED[:-1], "bad-tensors"),
        (PACKED[:7], "bad-tensors"),
        (b"", "bad-tensors"),
    ],
)
def test_what_is_no_masked_vector_is_refused(body: bytes, code: str) -> None:
    """Message, name, type, shape and place are as they must be, or the code says which is not."""
    assert refused_vector(body) == code


def test_a_vector_of_another_adapter_is_refused() -> None:
    """The cohort's length decides, and the refusal names both."""
    assert refused_vector(PACKED, 2) == refused_vector(PACKED, 4) == "wrong-shape"
    with pytest.raises(WireError, match=r"a vector of 4 elements, not \[3\]"):
        wire.unpack_masked(PACKED, 4)


@strategies.fuzzing
@given(st.binary(max_size=400))
def test_random_bytes_are_no_masked_vector_or_a_valid_one(body: bytes) -> None:
    """The invariant holds for any bytes, bare and behind an honest header length."""
    check_masked(body)
    check_masked(framed(body, VECTOR.tobytes()))


@strategies.fuzzing
@given(strategies.damaged(PACKED))
def test_damaged_masked_vectors_are_refused_or_valid(body: bytes) -> None:
    """The invariant holds for valid masked vectors with bytes changed, lost or added."""
    check_masked(body)


@strategies.fuzzing
@given(
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "more"]), strategies.json_values, max_size=2),
    st.dictionaries(st.sampled_from(["result", "cohort", "device", "more"]), strategies.json_values, max_size=2),
)
@example({"shape": [10**300]}, {})
@example({"data_offsets": [0, 10**300]}, {})
def test_masked_vectors_of_any_json_are_refused_or_valid(entry: dict[str, Any], fields: dict[str, Any]) -> None:
    """The invariant holds where any field of the entry or of the message has any JSON value."""
    check_masked(masked(RING | entry, message=json.dumps(msgspec.to_builtins(MASKED) | fields)))


# What a cohort's devices say in JSON ----------------------------------------------------------------------------------
SAID = [
    KEYS,
    Shares("c-1", "d1", {"d2": b"s" * SEALED}),
    MASKED,
    Reveal("c-1", "d1", {"d1": b"x" * SHARE}, {"d2": b"y" * SHARE}),
    Shares("c-1", "d1", {f"d{i}": b"s" * SEALED for i in range(MAX_MEMBERS)}),
]


@pytest.mark.parametrize("answer", SAID, ids=lambda answer: type(answer).__name__)
def test_every_answer_of_a_cohort_comes_back(answer: Any) -> None:
    """Each kind is told apart by its `result`, alone and among all others; its bytes travel as base64."""
    kinds: Any = Advertise | Shares | Masked | Reveal

    assert wire.decode(wire.encode(answer), kinds) == wire.decode(wire.encode(answer), type(answer)) == answer


def test_the_largest_cohort_fits_into_a_message() -> None:
    """128 devices with the longest ids: roster, shares, delivery and lists stay below what a message may have."""
    ids = tuple(f"{i:064}" for i in range(MAX_MEMBERS))
    of = Terms("c" * 64, MAX_MEMBERS, 86, 40, 1.0, 64)
    sealed, shares = dict.fromkeys(ids, b"s" * SEALED), dict.fromkeys(ids, b"x" * SHARE)
    messages: list[msgspec.Struct] = [
        SealShares(2**60, Roster(of, tuple(Advertise("c" * 64, id, b"c" * 32, b"m" * 32) for id in ids))),
        Mask(2**60, Delivery("c" * 64, ids[0], sealed)),
        Unmask(2**60, Survivors("c" * 64, ids, ids)),
        Shares("c" * 64, ids[0], sealed),
        Reveal("c" * 64, ids[0], shares, shares),
    ]

    assert max(len(wire.encode(message)) for message in messages) < MAX_JSON / 10


@pytest.mark.parametrize(
    "body",
    [
        wire.encode(KEYS).replace(b'"d1"', b'"d_1"'),
        wire.encode(KEYS).replace(b'"d1"', b'""'),
        wire.encode(KEYS).replace(b'"d1"', b'"' + b"d" * 65 + b'"'),
        wire.encode(KEYS).replace(b'"c-1"', b'"c\\n1"'),
        wire.encode(KEYS).replace(b'"c-1"', b'"c-1\\n"'),
        wire.encode(Advertise("c-1", "d1", b"c" * 31, b"m" * 32)),
        wire.encode(Advertise("c-1", "d1", b"c" * 32, b"m" * 33)),
        wire.encode(KEYS).replace(b"Y2Nj", b"Y2N!"),
        wire.encode(Shares("c-1", "d1", {"d2": b"s" * (SEALED - 1)})),
        wire.encode(Shares("c-1", "d1", {"d 2": b"s" * SEALED})),
        wire.encode(Shares("c-1", "d1", {f"d{i}": b"s" * SEALED for i in range(MAX_MEMBERS + 1)})),
        wire.encode(Reveal("c-1", "d1", {"d1": b"x" * (SHARE + 1)}, {})),
        wire.encode(Reveal("c-1", "d1", {}, {"d2": b""})),
        wire.encode(Reveal("c-1", "d1", {}, {f"d{i}": b"x" * SHARE for i in range(MAX_MEMBERS + 1)})),
        wire.encode(KEYS)[:-1] + b',"admin":true}',
    ],
)
def test_an_answer_of_another_form_is_refused(body: bytes) -> None:
    """Ids, sizes of keys and shares, and the number of devices have bounds; unknown fields are refused."""
    kinds: Any = Advertise | Shares | Masked | Reveal
    with pytest.raises(WireError) as caught:
        wire.decode(body, kinds)
    check_refusal(caught.value, {"bad-message"})


@pytest.mark.parametrize(
    "change",
    [{"size": 1}, {"size": 129}, {"threshold": 2}, {"threshold": 5}, {"length": 0}, {"length": 2**26 + 1}, {"clip": 0.0},
     {"clip": 1e300}, {"max_weight": 0}, {"max_weight": 2**40}, {"cohort": "c/1"}],
    ids=str,
)  # fmt: skip
def test_terms_that_a_server_must_not_ask_for_are_refused(change: dict[str, Any]) -> None:
    """A device takes part in no cohort of which a minority could betray it, nor in one that is too coarse or too large."""
    work: Any = Work
    body = json.dumps({"verb": "join", "version": 2, "terms": {**msgspec.to_builtins(TERMS), **change}}).encode()
    with pytest.raises(WireError) as caught:
        wire.decode(body, work)
    check_refusal(caught.value, {"bad-message"})


# Lines ----------------------------------------------------------------------------------------------------------------
SAMPLE = Sample(1, "a", "a great film", "good", (0.25, 0.75), 0.75, 0, "llm", "ab" * 32)
TEXT = Text("a", "a great film", 1)


def lines_of(body: bytes, kind: Any) -> list[Any]:
    """`unpack_lines` for a union too, of which mypy cannot speak."""
    return wire.unpack_lines(body, kind)


def check_lines(body: bytes, kind: Any) -> None:
    """`unpack_lines` under the invariant: lines within their bounds, or a WireError that can be told."""
    found = attempt(lambda: lines_of(body, kind))
    if isinstance(found, WireError):
        check_refusal(found, {"bad-message", "too-large"})
        assert found.detail.isprintable()
        return
    assert len(found) <= MAX_TEXTS
    assert lines_of(wire.pack_lines(found), kind) == found
    for line in found:
        if not isinstance(line, Withdrawal):
            assert line.text.isprintable()
            assert 0 < len(line.text) <= MAX_TEXT
            assert 0 < len(line.id) <= MAX_METRICS
        if isinstance(line, Sample):
            assert all(0 <= p <= 1 for p in (*line.soft, line.quality))
            assert sum(line.soft) > 0


def refused_lines(*lines: msgspec.Struct, kind: Any = Text) -> str:
    with pytest.raises(WireError) as caught:
        wire.unpack_lines(wire.pack_lines(lines), kind)
    return caught.value.code


@given(st.lists(strategies.texts(), max_size=5))
def test_a_sheet_comes_back(texts: list[Text]) -> None:
    """unpack_lines is the inverse of pack_lines, one line a text, and the same texts give the same bytes."""
    body = wire.pack_lines(texts)

    assert wire.unpack_lines(body, Text) == texts
    assert body.count(b"\n") == len(texts)
    assert wire.pack_lines(iter(texts)) == body


@given(st.lists(strategies.samples() | st.builds(Withdrawal, st.integers(0, 2**60), st.text(max_size=9)), max_size=5))
def test_a_page_of_the_feed_comes_back(lines: list[Line]) -> None:
    """Samples and withdrawals keep their order and every field."""
    assert lines_of(wire.pack_lines(lines), Line) == lines


def test_lines_at_their_limits_are_fine() -> None:
    """The bounds themselves are allowed: the longest text, in its longest bytes, the longest id, certainty, the most lines."""
    longest = Text("i" * MAX_METRICS, "\N{GRINNING FACE}" * MAX_TEXT, 0)
    quoted = Text("a", '"' * MAX_TEXT, 0)
    certain = msgspec.structs.replace(SAMPLE, soft=(0.0, 1.0), quality=1.0)

    assert wire.unpack_lines(wire.pack_lines([longest, quoted]), Text) == [longest, quoted]
    assert wire.unpack_lines(wire.pack_lines([certain]), Sample) == [certain]
    assert len(wire.unpack_lines(wire.pack_lines([TEXT] * MAX_TEXTS), Text)) == MAX_TEXTS
    assert wire.unpack_lines(b"", Text) == []
    assert wire.unpack_lines(wire.encode(TEXT), Text) == [TEXT]  # without a last line end


@pytest.mark.parametrize(
    "line",
    [
        Text("", "a text", 0),
        Text("i" * (MAX_METRICS + 1), "a text", 0),
        Text("a", "", 0),
        Text("a", "x" * (MAX_TEXT + 1), 0),
        *(Text("a", f"a{c}text", 0) for c in "\n\r\t\0\x1b\x7f\x85\u2028\u202e\u200b\ufeff"),
        msgspec.structs.replace(SAMPLE, text="two\nlines"),
        msgspec.structs.replace(SAMPLE, id=""),
        msgspec.structs.replace(SAMPLE, soft=(0.0, 1.0001)),
        msgspec.structs.replace(SAMPLE, soft=(-0.1, 1.0)),
        msgspec.structs.replace(SAMPLE, soft=(0.0, 0.0)),
        msgspec.structs.replace(SAMPLE, soft=()),
        msgspec.structs.replace(SAMPLE, quality=1.0001),
        msgspec.structs.replace(SAMPLE, quality=-0.1),
    ],
)
def test_a_line_out_of_bounds_is_refused(line: Text | Sample) -> None:
    """Ids and texts of no length or too much, what moves a terminal's cursor, and what is no probability, beside a good line."""
    good = TEXT if isinstance(line, Text) else SAMPLE

    assert refused_lines(good, line, kind=type(line)) == "bad-message"


def test_too_many_and_too_long_lines_are_not_parsed() -> None:
    """One line over the limit is refused, whatever is in it; and so is a line too long, though it is no JSON."""
    for body in (b"[\n" * (MAX_TEXTS + 1), b"[" * (16 * MAX_TEXT + 1), wire.pack_lines([TEXT]) + b"[" * 1_000_000):
        with pytest.raises(WireError) as caught:
            wire.unpack_lines(body, Text)
        assert (caught.value.code, caught.value.status) == ("too-large", 413)


@pytest.mark.parametrize(
    "body",
    [
        b'{"id":"a","text":"b","label":1,"more":1}',
        b'{"id":"a","text":"b"}',
        b'{"id":"a","text":"b","label":"1"}',
        b'{"id":"a","text":"b","label":1.0}',
        b'{"id":"a","text":"\\ud800","label":1}',
        b'{"id":"a","text":"\xff","label":1}',
        b'{"id":"a","text":"b","label":1}{"id":"a","text":"b","label":1}',
        b'\n{"id":"a","text":"b","label":1}',
        b"\n",
        b"null",
        wire.encode(SAMPLE),
    ],
)
def test_a_line_that_is_no_text_is_refused(body: bytes) -> None:
    """Each line is exactly one value of its kind: no other field, none missing, none of another type, no empty line."""
    with pytest.raises(WireError, match="bad-message"):
        wire.unpack_lines(body, Text)


def test_a_refusal_never_says_what_moves_a_cursor() -> None:
    """A message with a hostile name in it is refused in one printable line."""
    with pytest.raises(WireError) as caught:
        wire.unpack_lines(b'{"id":"a","text":"b","label":1,"x\\ny\\u001b[2J":2}', Text)
    assert caught.value.detail == "not a valid message: Object contains unknown field `x?y?[2J`"


@strategies.fuzzing
@given(st.binary(max_size=200), st.sampled_from([Text, Line]))
def test_random_bytes_are_no_lines_or_valid_ones(body: bytes, kind: Any) -> None:
    """The invariant holds for any bytes."""
    check_lines(body, kind)


@strategies.fuzzing
@given(strategies.damaged(wire.pack_lines([TEXT, TEXT])), strategies.damaged(wire.pack_lines([SAMPLE, Withdrawal(2, "a")])))
def test_damaged_lines_are_refused_or_valid(sheet: bytes, feed: bytes) -> None:
    """The invariant holds for a sheet and a feed with bytes changed, lost or added."""
    check_lines(sheet, Text)
    check_lines(feed, Line)


@strategies.fuzzing
@given(st.dictionaries(st.sampled_from(["id", "text", "label", "soft", "quality", "seq"]), strategies.json_values, max_size=2))
def test_lines_of_any_json_are_refused_or_valid(fields: dict[str, Any]) -> None:
    """The invariant holds where any field of a line has any JSON value."""
    for good, kind in ((TEXT, Text), (SAMPLE, Line)):
        check_lines(json.dumps(msgspec.to_builtins(good) | fields).encode() + b"\n", kind)


# Bounds of what is mixed in -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "mix", ['{"until":-1}', '{"until":9223372036854775808}', '{"until":1,"weight":-0.5}', '{"until":1,"batch_size":0}']
)
def test_a_mix_out_of_bounds_is_refused(mix: str) -> None:
    """What no device could do is refused where the work is read; a weight of zero, and no line at all, are fine."""
    with pytest.raises(WireError, match=r"mix\.until and mix\.weight must not be negative"):
        wire.decode(mix.encode(), Mix)
    assert wire.decode(b'{"until":0,"weight":0}', Mix) == Mix(0, 0.0)


@pytest.mark.parametrize("temperature", ["0", "-0.5", "0.0", "-1e-300"])
def test_a_temperature_that_is_not_positive_is_refused(temperature: str) -> None:
    """Work that would divide by it, or turn soft labels round, is refused by name; one that says none leaves them as they are."""
    with pytest.raises(WireError, match=r"mix\.temperature must be positive and finite"):
        wire.decode(f'{{"until":1,"temperature":{temperature}}}'.encode(), Mix)
    assert wire.decode(b'{"until":1,"temperature":0.01}', Mix) == Mix(1, temperature=0.01)
    assert wire.decode(b'{"until":1}', Mix).temperature == 1.0


@pytest.mark.parametrize("temperature", [math.inf, -math.inf, math.nan])
def test_a_temperature_that_is_not_finite_is_refused(temperature: float) -> None:
    """JSON cannot say it, a server's settings can."""
    with pytest.raises(SettingsError, match=r"mix\.temperature must be positive and finite"):
        Mix(1, temperature=temperature)
