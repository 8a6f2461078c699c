"""What a model makes of public samples, as it travels, and whose word counts; pure.

FedMKT (Fan et al. 2024, section 4): instead of weights, devices and server exchange the likeliest tokens at each position of
the public answers, and each sample is learned from whoever says its answer best. There the sender says how well it does. Here
the receiver knows the samples, works that out from what was sent, and compares it in nats per byte of the answer, which mean
the same for every tokenizer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from edge_sdk import wire
from edge_sdk.adapters import Shapes, mismatch
from edge_sdk.errors import DataError, WireError
from edge_sdk.protocol import MAX_K, Judgment
from edge_sdk.training.batches import Classes
from edge_sdk.wire import MAX_HEADER, MAX_METRICS, MAX_TEXT, MAX_TEXTS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_POSITIONS = 512  # of an answer, as `task.answer_tokens`
MAX_VOCABULARY = 1 << 20
LOWEST = np.finfo(np.float16).min  # what a log-probability of minus infinity travels as
SLACK = 0.02  # what the probabilities of a position may add up to above 1: they are rounded to 16 bits
CHUNK = 1 << 12  # positions that are checked at once, which bounds the memory it takes
LEVEL = 0.5 / 255  # the most that 8 bits may round to no probability

T = TypeVar("T")
C = TypeVar("C", bound="Contents")

DTYPES: dict[str, type[np.generic]] = {"U16": np.uint16, "U32": np.uint32, "F16": np.float16}


@dataclass(frozen=True)
class Truth:
    """A public answer as its sender's tokenizer cuts it.

    Args:
        tokens: ids of its tokens, its end among them where models are to say it.
        size: how many bytes of UTF-8 the tokens have read of it: all, unless it was cut.
    """

    tokens: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Sheet:
    """The public samples in the tokens of one sender: what its knowledge may be about.

    Args:
        tokenizer: digest of the sender's vocabulary, `alignment.Vocabulary.digest`.
        vocabulary: how many tokens there are.
        truths: by sample id.
    """

    tokenizer: str
    vocabulary: int
    truths: Mapping[str, Truth]

    def __post_init__(self) -> None:
        """Raises: DataError: a sample or the vocabulary is out of bounds."""
        if not 2 <= self.vocabulary <= MAX_VOCABULARY or len(self.truths) > MAX_TEXTS:
            raise DataError(f"knowledge is about at most {MAX_TEXTS} samples and 2 to {MAX_VOCABULARY} tokens")
        for name, truth in self.truths.items():
            if not 1 <= len(name) <= MAX_METRICS or not name.isprintable():
                raise DataError(f"a sample's id has 1 to {MAX_METRICS} printable characters")
            if not 1 <= len(truth.tokens) <= MAX_POSITIONS or not 1 <= truth.size <= 4 * MAX_TEXT:
                raise DataError(f"the answer of {name} has no bytes, or not 1 to {MAX_POSITIONS} tokens")
            if not 0 <= min(truth.tokens) <= max(truth.tokens) < self.vocabulary:
                raise DataError(f"the answer of {name} has a token that is not in the vocabulary of {self.vocabulary}")


@dataclass(frozen=True)
class Knowledge:
    """What one model says of one public answer.

    Args:
        id: of the sample.
        size: as `Truth`'s.
        ids: the likeliest tokens at each position of the answer, (m, k).
        logprobs: their natural log-probabilities over the whole vocabulary, (m, k).
    """

    id: str
    size: int
    ids: Ints
    logprobs: NDArray[np.float32]


# Whom to believe ------------------------------------------------------------------------------------------------------
def nats_per_byte(knowledge: Knowledge, truth: Truth, vocabulary: int) -> float:
    """How well an answer was foreseen: the mean of -ln q(true token) over the bytes of the answer, 0 or more.

    With s the sum of the position's k probabilities p, and w = max(s, 1):

        q(token) = p / w                                              if it is among the k
                 = min(max(1 - s, 0) / (vocabulary - k), min p / w)   otherwise

    q adds up to at most 1, so that a position costs nothing only where all is put on the truth, and costs the less the more the
    truth is given. A token outside the k is no likelier than the least of them, so it never pays to leave the truth out for a
    token that is no likelier. A truth of no probability costs infinity.

    Raises:
        DataError: another number of positions or bytes than the answer's.
    """
    if len(knowledge.ids) != len(truth.tokens) or knowledge.size != truth.size:
        raise DataError(f"{knowledge.id} is known at {len(knowledge.ids)} positions, its answer has {len(truth.tokens)}")
    p = np.exp(knowledge.logprobs.astype(np.float64))
    s = p.sum(1)
    w = np.maximum(s, 1.0)
    hit = knowledge.ids == np.asarray(truth.tokens)[:, None]
    others = vocabulary - p.shape[1]
    spread = np.maximum(1 - s, 0.0) / others if others > 0 else np.zeros(len(s))
    q = np.where(hit.any(1), (p * hit).sum(1) / w, np.minimum(spread, p.min(1) / w))
    with np.errstate(divide="ignore"):
        return float(-np.log(q).sum()) / truth.size + 0.0  # no minus zero


def class_nats(classes: Classes, label: int) -> float:
    """-ln of the true class's probability, which 8 bits leave at least half a level; infinite where nothing was said."""
    if not classes.probabilities.sum() > 0:
        return math.inf
    return -math.log(max(float(classes.probabilities[label]), LEVEL))


def select(own: Floats, teachers: Floats) -> Ints:
    """DualMinCE (FedMKT, algorithm 2): for each sample the teacher that says it best, if better than the receiver itself.

    Args:
        own: the receiver's nats per byte, (n,).
        teachers: those of each teacher, (teachers, n); NaN or infinity where it knows nothing of a sample.

    Returns:
        (n,) the index of a teacher, the first among equals; -1 where none is better.

    Raises:
        DataError: shapes differ.
    """
    if teachers.ndim != 2 or own.shape != teachers.shape[1:]:
        raise DataError(f"{own.shape} samples of one's own, and {teachers.shape} of the teachers, (teachers, samples)")
    if not len(teachers):
        return np.full(own.shape, -1, np.int64)
    known = np.where(np.isnan(teachers), np.inf, teachers)
    best = known.argmin(0)
    least = known[best, np.arange(len(own))]
    return np.where(least < own, best, -1).astype(np.int64)


def class_targets(
    labels: Sequence[int], own: NDArray[np.float32], teachers: Sequence[NDArray[np.float32]], label_weight: float
) -> tuple[NDArray[np.float32], Ints]:
    """What to learn of public texts at class level: weight * label + (1 - weight) * the chosen teacher, or the label alone.

    So cross-entropy against a row is weight * CE(label) + (1 - weight) * CE(teacher), FedMKT's loss with lambda = weight.

    Args:
        own: the receiver's class probabilities, (n, n_classes). teachers: those of each teacher; a row of zeros says nothing.

    Returns:
        (n, n_classes) target probabilities, and (n,) whose they are: a teacher's index, or -1.
    """
    chosen = select(_class_nats(labels, own), np.stack([_class_nats(labels, t) for t in teachers]) if teachers else _none(labels))
    targets = np.eye(own.shape[1], dtype=np.float32)[list(labels)]
    for row, teacher in enumerate(chosen):
        if teacher >= 0:
            said = teachers[teacher][row]
            targets[row] = label_weight * targets[row] + (1 - label_weight) * said / said.sum()
    return targets, chosen


def _class_nats(labels: Sequence[int], probabilities: NDArray[np.float32]) -> Floats:
    return np.array([class_nats(Classes(row), label) for row, label in zip(probabilities, labels, strict=True)], np.float64)


def _none(labels: Sequence[int]) -> Floats:
    return np.empty((0, len(labels)), np.float64)


# Bytes ----------------------------------------------------------------------------------------------------------------
class Contents(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What travels beside the tensors of knowledge: in whose tokens, and about which samples."""

    tokenizer: str
    vocabulary: int
    k: int
    samples: tuple[str, ...]


class Judged(Contents, frozen=True, forbid_unknown_fields=True):
    """The same of a device's knowledge, which is its judgment of a sheet."""

    judgment: Judgment


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the header says of one tensor."""

    dtype: Literal["U16", "U32", "F16"]
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def data_size(samples: int, positions: int, k: int, vocabulary: int) -> int:
    """Bytes of the tensors of this many samples with this many positions in all, not compressed."""
    return 6 * samples + positions * k * (_width(vocabulary) + 2)


def size_limit(sheet: Sheet, k: int) -> int:
    """The largest body that may hold knowledge of a sheet with at most `k` tokens a position."""
    return _compressed(plain_limit(sheet, k))


def pack(knowledge: Sequence[Knowledge], sheet: Sheet, judgment: Judgment | None = None) -> bytes:
    """One compressed safetensors file: ids in 2 or 4 bytes, log-probabilities in 16 bits; the same input, the same bytes.

    Args:
        judgment: whose knowledge it is, where a device tells the server.

    Raises:
        DataError: what is known is not of this sheet, or is no distribution: nobody would accept it.
    """
    widths = {known.ids.shape[1:] for known in knowledge} or {(1,)}
    if len(widths) != 1 or len(next(iter(widths))) != 1:
        raise DataError("all knowledge in one message has the same number of tokens at each position")
    (k,) = next(iter(widths))
    for known in knowledge:
        if known.ids.shape != known.logprobs.shape:
            raise DataError(f"{known.id} has ids {known.ids.shape} and log-probabilities {known.logprobs.shape}")
        if known.ids.size and not 0 <= known.ids.min() <= known.ids.max() < sheet.vocabulary:
            raise DataError(f"{known.id} has a token id that is not in the vocabulary of {sheet.vocabulary}")
    about = sheet.tokenizer, sheet.vocabulary, k, tuple(known.id for known in knowledge)
    contents = Contents(*about) if judgment is None else Judged(*about, judgment)
    said = [_rounded(known.logprobs) for known in knowledge]
    tensors = {
        "ids": np.concatenate([np.empty((0, k)), *(known.ids for known in knowledge)]).astype(_id_type(sheet.vocabulary)),
        "lengths": np.array([min(len(known.ids), MAX_POSITIONS + 1) for known in knowledge], np.uint16),
        "logprobs": np.concatenate([np.empty((0, k), np.float16), *said]),
        "sizes": np.array([min(max(known.size, 0), 2**32 - 1) for known in knowledge], np.uint32),
    }
    body = _pack(contents, tensors)
    try:
        _unpack(body, type(contents), lambda _: sheet, k, plain_limit(sheet, k))
    except WireError as error:
        raise DataError(f"this knowledge cannot be sent: {error.detail}") from error
    return body


def unpack(body: bytes, sheet: Sheet, k: int = MAX_K) -> list[Knowledge]:
    """The knowledge of a message, in the order it was packed, after every check that needs no model.

    Args:
        sheet: the samples in the sender's tokens; the message may be about any of them, each once.
        k: the most tokens a position may have.

    Raises:
        WireError: `too-large`, `bad-message`, `bad-tensors` (not compressed safetensors), `wrong-shape`, `not-finite`, or
            `wrong-knowledge` (another tokenizer, unknown or repeated samples, another answer, ids that are no tokens or
            repeated, no distribution).
    """
    return _unpack(body, Contents, lambda _: sheet, k, plain_limit(sheet, k))[1]


def unpack_judgment(
    body: bytes, sheet: Callable[[Judgment], Sheet], most: int, k: int = MAX_K
) -> tuple[Judgment, list[Knowledge]]:
    """A device's judgment and its knowledge, as `unpack`.

    Args:
        sheet: the samples in the tokens of whoever judged them; it raises WireError where there are none.
        most: bytes that are decompressed at most, whoever it is; see `plain_limit`.

    Raises:
        WireError: as `unpack`, or what `sheet` raises.
    """

    def asked(contents: Judged) -> Sheet:
        wire.check_result(contents.judgment)
        return sheet(contents.judgment)

    contents, found = _unpack(body, Judged, asked, k, most)
    return contents.judgment, found


def _unpack(body: bytes, kind: type[C], sheet_of: Callable[[C], Sheet], k: int, limit: int) -> tuple[C, list[Knowledge]]:
    contents, header, data = _open(body, kind, limit)
    sheet = sheet_of(contents)
    if (contents.tokenizer, contents.vocabulary) != (sheet.tokenizer, sheet.vocabulary):
        raise _wrong("it is in the tokens of another tokenizer than the sender's bundle has")
    if not 1 <= contents.k <= min(k, MAX_K, sheet.vocabulary):
        raise WireError("wrong-shape", f"a position has 1 to {min(k, MAX_K, sheet.vocabulary)} tokens, not {contents.k}", 422)
    _check_samples(contents.samples, sheet.truths)
    truths = [sheet.truths[name] for name in contents.samples]
    count, positions = len(truths), sum(len(truth.tokens) for truth in truths)
    shapes = {"ids": (positions, contents.k), "lengths": (count,), "logprobs": (positions, contents.k), "sizes": (count,)}
    dtypes = {"ids": f"U{8 * _width(sheet.vocabulary)}", "lengths": "U16", "logprobs": "F16", "sizes": "U32"}
    arrays = _arrays(header, data, shapes, dtypes)
    if arrays["lengths"].tolist() != [len(truth.tokens) for truth in truths]:
        raise _wrong("an answer has another number of positions than its tokens")
    if arrays["sizes"].tolist() != [truth.size for truth in truths]:
        raise _wrong("an answer has another length in bytes")
    _check_distributions(arrays["ids"], arrays["logprobs"], sheet.vocabulary)
    ids, logprobs = arrays["ids"].astype(np.int64), arrays["logprobs"].astype(np.float32)
    ends = np.cumsum([len(truth.tokens) for truth in truths], dtype=np.int64)
    return contents, [
        Knowledge(name, truth.size, ids[end - len(truth.tokens) : end], logprobs[end - len(truth.tokens) : end])
        for name, truth, end in zip(contents.samples, truths, ends.tolist(), strict=True)
    ]


def _pack(contents: msgspec.Struct, tensors: dict[str, NDArray[np.generic]]) -> bytes:
    plain = bytes(save(tensors, metadata={"message": wire.encode(contents).decode()}))
    if len(plain) - sum(tensor.nbytes for tensor in tensors.values()) > MAX_HEADER:
        raise DataError("too many samples, or too long ids, for one message; send fewer")
    return zlib.compress(plain)


def _rounded(logprobs: NDArray[np.float32]) -> NDArray[np.float16]:
    """In 16 bits: minus infinity becomes the lowest number, and what only rounding lifted above 0 becomes 0."""
    with np.errstate(over="ignore"):  # what becomes infinite is refused by `unpack`
        found: NDArray[np.float16] = np.maximum(logprobs, LOWEST).astype(np.float16)
    found[(found > 0) & (found < SLACK)] = 0
    return found


def _open(body: bytes, kind: type[T], limit: int) -> tuple[T, dict[str, msgspec.Raw], memoryview]:
    """The message, the entries of the tensors and their data; never more than `limit` bytes are decompressed."""
    if len(body) > _compressed(limit):
        raise WireError("too-large", f"this knowledge may have {_compressed(limit)} bytes, it has {len(body)}", 413)
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise WireError("bad-tensors", "the body is not compressed with zlib") from error
    if len(plain) > limit:
        raise WireError("too-large", f"this knowledge may have {limit} bytes once decompressed; it has more", 413)
    if not inflater.eof or inflater.unused_data:
        raise WireError("bad-tensors", "the compressed body is cut short, or bytes follow it")
    header, metadata, data = wire.open_tensors(plain)
    return wire.decode(wire.message_of(metadata), kind), header, data


def _arrays(
    header: Mapping[str, msgspec.Raw], data: memoryview, expected: Shapes, dtypes: Mapping[str, str]
) -> dict[str, NDArray[np.generic]]:
    """Arrays that have the expected names, shapes and types and fill `data` exactly; views of it."""
    entries: dict[str, Entry] = {}
    for name, raw in header.items():
        try:
            entries[name] = msgspec.json.decode(raw, type=Entry)
        except wire.NOT_JSON as error:
            raise WireError("wrong-shape", f"{name[:100]!r} is no tensor of knowledge with shape and offsets", 422) from error
    if problem := mismatch({name: entry.shape for name, entry in entries.items()}, expected):
        raise WireError("wrong-shape", problem[:500], 422)
    arrays: dict[str, NDArray[np.generic]] = {}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype != dtypes[name]:
            raise WireError("wrong-shape", f"{name} is of type {dtypes[name]}, not {entry.dtype}", 422)
        dtype = np.dtype(DTYPES[entry.dtype]).newbyteorder("<")
        end = position + dtype.itemsize * math.prod(entry.shape)
        if entry.data_offsets != (position, end) or end > len(data):
            raise WireError("bad-tensors", f"{name} does not lie in the file as its shape says")
        arrays[name] = np.frombuffer(data[position:end], dtype).reshape(entry.shape)
        position = end
    if position != len(data):
        raise WireError("bad-tensors", "bytes follow the last tensor")
    return arrays


def _check_samples(names: Sequence[str], known: Mapping[str, object]) -> None:
    if unknown := next((name for name in names if name not in known), None):
        raise _wrong(f"there is no public sample {unknown[:MAX_METRICS]!r}")
    if len(set(names)) != len(names):
        raise _wrong("a sample comes twice")


def _check_distributions(ids: NDArray[np.generic], logprobs: NDArray[np.generic], vocabulary: int) -> None:
    for at in range(0, len(ids), CHUNK):
        own, said = ids[at : at + CHUNK].astype(np.int64), logprobs[at : at + CHUNK].astype(np.float64)
        if not np.isfinite(said).all():
            raise WireError("not-finite", "a log-probability is NaN or infinite", 422)
        if (own >= vocabulary).any():
            raise _wrong(f"a token id is not in the vocabulary of {vocabulary}")
        if (np.diff(np.sort(own, axis=1), axis=1) == 0).any():
            raise _wrong("a position names a token twice")
        if (said > 0).any() or (np.exp(said).sum(1) > 1 + SLACK).any():
            raise _wrong("the probabilities of a position add up to more than 1: they must be normalized over the vocabulary")


def _wrong(detail: str) -> WireError:
    return WireError("wrong-knowledge", detail, 422)


def _width(vocabulary: int) -> int:
    return 2 if vocabulary <= 1 << 16 else 4


def _id_type(vocabulary: int) -> type[np.generic]:
    return DTYPES[f"U{8 * _width(vocabulary)}"]


def plain_limit(sheet: Sheet, k: int) -> int:
    """The most bytes that knowledge of a sheet with at most `k` tokens a position has, not compressed."""
    positions = sum(len(truth.tokens) for truth in sheet.truths.values())
    k = max(min(k, MAX_K, sheet.vocabulary), 1)
    return 8 + MAX_HEADER + data_size(len(sheet.truths), positions, k, sheet.vocabulary)


def _compressed(size: int) -> int:
    """The most that zlib makes of this many bytes (`compressBound` in zlib.h)."""
    return size + (size >> 12) + (size >> 14) + (size >> 25) + 13
