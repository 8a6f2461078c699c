"""Knowledge of public samples: what it is worth by hand, there and back, and nothing hostile gets past the reader.

The invariant of all fuzzing here: whatever bytes arrive, `unpack` and `unpack_classes` return checked values or raise
`WireError`, never anything else.
"""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save

from edge_sdk.errors import DataError, WireError
from edge_sdk.knowledge import (
    LEVEL,
    LOWEST,
    MAX_POSITIONS,
    SLACK,
    Knowledge,
    Sheet,
    Truth,
    class_nats,
    data_size,
    nats_per_byte,
    pack,
    plain_limit,
    select,
    size_limit,
    unpack,
    unpack_judgment,
)
from edge_sdk.protocol import Judgment, Problem
from edge_sdk.training.batches import Classes
from edge_sdk.wire import MAX_HEADER, MAX_TEXTS, encode
from tests import strategies

CODES = {"too-large", "bad-message", "bad-tensors", "wrong-shape", "not-finite", "wrong-knowledge"}
V = 50
SHEET = Sheet("digest", V, {"a": Truth((3, 4, 1), 9), "b": Truth((7,), 2), "ç": Truth((9, 1), 5)})


def logs(*rows: list[float]) -> NDArray[np.float32]:
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, np.float32))


def known(name: str, k: int = 4, seed: int = 0, sheet: Sheet = SHEET) -> Knowledge:
    """The k likeliest of a random distribution at each position."""
    rng, m = np.random.default_rng(seed), len(sheet.truths[name].tokens)
    p = rng.dirichlet([0.3] * sheet.vocabulary, m) + 1e-9
    ids = np.argsort(-p, axis=1)[:, :k]
    logprobs = np.log(np.take_along_axis(p / p.sum(1, keepdims=True), ids, 1)).astype(np.float32)
    return Knowledge(name, sheet.truths[name].size, ids.astype(np.int64), logprobs)


def one(ids: list[int], p: list[float]) -> Knowledge:
    """Knowledge of `b`, an answer of one token, 7, and two bytes."""
    return Knowledge("b", 2, np.array([ids]), logs(p))


def nats(ids: list[int], p: list[float], vocabulary: int = V) -> float:
    """Of that one token."""
    return 2 * nats_per_byte(one(ids, p), SHEET.truths["b"], vocabulary)


KNOWN = [known("a"), known("b", seed=1), known("ç", seed=2)]
BODY = pack(KNOWN, SHEET)
PLAIN = zlib.decompress(BODY)
JUDGMENT = Judgment("phone", 3, 12, {"loss": 0.5})
OWN_BODY = pack(KNOWN, SHEET, JUDGMENT)
MOST = plain_limit(SHEET, 4)
PARTS = load(PLAIN)
CONTENTS = {"tokenizer": "digest", "vocabulary": V, "k": 4, "samples": ["a", "b", "ç"]}


def packed(contents: Any = None, tensors: dict[str, Any] | None = None, **changes: Any) -> bytes:
    """A right body but for these changes of its message or its tensors."""
    tensors = {**PARTS, **(tensors or {})}
    message = contents if isinstance(contents, str) else json.dumps({**CONTENTS, **changes})
    return zlib.compress(save({name: np.ascontiguousarray(t) for name, t in tensors.items()}, metadata={"message": message}))


def with_tensor(name: str, change: Callable[[Any], Any]) -> bytes:
    """A right body whose tensor was changed in place."""
    tensor = PARTS[name].copy()
    change(tensor)
    return packed(tensors={name: tensor})


def refusal(body: bytes, sheet: Sheet = SHEET, k: int = 4) -> str:
    with pytest.raises(WireError) as caught:
        unpack(body, sheet, k)
    return check_refusal(caught.value)


def check_refusal(error: WireError) -> str:
    """A refusal has a known code and a client's status, and its sentence is short and can be sent."""
    assert error.code in CODES
    assert 400 <= error.status < 500
    assert 0 < len(error.detail) <= 600
    assert encode(Problem("", "", error.status, error.code, error.detail))
    return error.code


def check_unpacked(body: bytes) -> None:
    """Both readers under the invariant."""
    try:
        found = unpack(body, SHEET, 4)
    except WireError as error:
        check_refusal(error)
    else:
        assert len({x.id for x in found}) == len(found)
        for x in found:
            truth = SHEET.truths[x.id]
            assert x.ids.shape == x.logprobs.shape
            assert len(x.ids) == len(truth.tokens)
            assert 1 <= x.ids.shape[1] <= 4
            assert np.isfinite(x.logprobs).all()
            assert nats_per_byte(x, truth, V) >= 0
    try:
        judgment, known = unpack_judgment(body, lambda _: SHEET, MOST, 4)
    except WireError as error:
        check_refusal(error)
    else:
        assert isinstance(judgment, Judgment)
        assert {x.id for x in known} <= SHEET.truths.keys()


# Whom to believe ------------------------------------------------------------------------------------------------------
def test_what_is_listed_counts_as_it_is() -> None:
    """Token 7 with probability .25 costs ln 4, over two bytes half of it."""
    assert nats([3, 7], [0.5, 0.25]) == pytest.approx(math.log(4))
    assert nats_per_byte(one([3, 7], [0.5, 0.25]), SHEET.truths["b"], V) == pytest.approx(math.log(2))


def test_what_is_not_listed_shares_what_is_left() -> None:
    """.2 is left for the 48 other tokens, if that is not more than the least of the listed; if it is, that counts."""
    assert nats([3, 4], [0.7, 0.1]) == pytest.approx(-math.log(0.2 / 48))
    assert nats([3, 4], [0.7, 0.1], vocabulary=3) == pytest.approx(-math.log(0.1))


def test_several_positions_add_up() -> None:
    """Tokens 3, 4 and 1 of 9 bytes: ln 2 + ln 4 + ln 8 = 6 ln 2."""
    said = Knowledge("a", 9, np.array([[3, 0], [0, 4], [1, 0]]), logs([0.5, 0.1], [0.1, 0.25], [0.125, 0.1]))

    assert nats_per_byte(said, SHEET.truths["a"], V) == pytest.approx(6 * math.log(2) / 9)


def test_the_whole_truth_costs_nothing_and_a_sure_mistake_everything() -> None:
    """All on the true token: 0, not less, and no minus zero. All on others: infinity, without a warning."""
    for ids, p in (([7, 3], [1.0, 0.0]), ([7], [1.0])):
        assert str(nats(ids, p)) == "0.0"
    assert nats([3, 4], [1.0, 0.0]) == math.inf
    assert nats([0, 1], [0.5, 0.5], vocabulary=2) == math.inf


def test_a_sum_above_one_is_divided_away() -> None:
    """What rounding lets pass gives nobody more than 1."""
    assert nats([7, 3], [1.0, SLACK]) == pytest.approx(math.log(1 + SLACK))
    assert nats([3, 7], [0.5, 0.51]) == pytest.approx(-math.log(0.51 / 1.01))


def test_equal_logits_are_worth_what_they_say() -> None:
    """A model that knows nothing costs ln V for a token, listed or not, and more than any that knows something."""
    flat = [1 / V, 1 / V]

    assert nats([7, 3], flat) == pytest.approx(math.log(V))
    assert nats([2, 3], flat) == pytest.approx(math.log(V))
    assert select(np.array([2.0]), np.array([[nats([2, 3], flat)], [nats([7, 3], [0.2, 0.1])]])).tolist() == [1]


@given(st.integers(2, 8), st.integers(0, 10_000))
def test_a_lie_cannot_gain(vocabulary: int, seed: int) -> None:
    """Over all tokens q is no more than 1, so no lie is worth more than the truth told for sure; more on it never costs more;
    to leave it out for a token that is no likelier never pays."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, vocabulary + 1))
    p = rng.dirichlet([0.4] * vocabulary)
    ids = np.argsort(-p)[:k]

    def cost(truth: int, ids: NDArray[np.int64], p: NDArray[np.float64]) -> float:
        with np.errstate(divide="ignore"):
            said = Knowledge("x", 1, ids[None], np.log(p[None]).astype(np.float32))
        return nats_per_byte(said, Truth((truth,), 1), vocabulary)

    costs = [cost(t, ids, p[ids]) for t in range(vocabulary)]
    assert min(costs) >= 0
    assert sum(math.exp(-c) for c in costs) <= 1 + 1e-5
    truth = int(ids[rng.integers(k)])
    more = p[ids].copy()
    more[ids == truth] += rng.random() * (1 - more.sum())
    assert cost(truth, ids, more) <= costs[truth] + 1e-6
    unlisted = np.setdiff1d(np.arange(vocabulary), ids)
    if len(unlisted):
        instead = ids.copy()
        instead[ids == truth] = unlisted[0]  # no likelier than what is listed
        assert cost(truth, instead, p[instead]) >= costs[truth] - 1e-6


def test_knowledge_of_another_answer_has_no_worth() -> None:
    """Another number of positions or of bytes."""
    for said in (replace(known("a"), size=2), replace(known("b"), size=3)):
        with pytest.raises(DataError, match="positions"):
            nats_per_byte(said, SHEET.truths["b"], V)


def test_the_best_teacher_is_taken_where_it_beats_ones_own() -> None:
    """The least of two; the first of equals; none that is only as good; none that knows nothing."""
    own = np.array([1.0, 1.0, 1.0, 1.0, math.inf, 0.5])
    teachers = np.array([[0.5, 0.9, 1.0, math.nan, 3.0, math.inf], [0.7, 0.2, 2.0, 0.9, math.nan, 0.5]])

    assert select(own, teachers).tolist() == [0, 1, -1, 1, 0, -1]
    assert select(np.array([1.0]), np.array([[0.5], [0.5]])).tolist() == [0]
    assert select(np.array([math.inf]), np.array([[math.nan], [math.inf]])).tolist() == [-1]
    assert select(np.array([1.0, 2.0]), np.empty((0, 2))).tolist() == [-1, -1]
    for wrong in (np.ones(2), np.ones((1, 3))):
        with pytest.raises(DataError, match="teachers"):
            select(np.ones(2), wrong)


@given(st.integers(0, 4), st.integers(0, 5), st.integers(0, 10_000))
def test_whoever_is_chosen_is_least_and_better(count: int, n: int, seed: int) -> None:
    """Nobody beats the chosen one, and without one nobody beats the receiver."""
    rng = np.random.default_rng(seed)
    own, teachers = rng.integers(0, 4, n) / 2, rng.integers(0, 4, (count, n)) / 2
    for i, chosen in enumerate(select(own, teachers)):
        least = teachers[:, i].min(initial=math.inf)
        assert teachers[chosen, i] == least < own[i] if chosen >= 0 else least >= own[i]


# There and back -------------------------------------------------------------------------------------------------------
@given(st.permutations(["a", "b", "ç"]), st.integers(0, 3), st.integers(1, 6), st.integers(0, 1000), st.booleans())
def test_knowledge_comes_back(names: list[str], count: int, k: int, seed: int, many: bool) -> None:
    """Ids exactly, log-probabilities to 16 bits, in the same order; the same input gives the same bytes, within the limit."""
    sheet = replace(SHEET, vocabulary=70_000 if many else V)
    sent = [known(name, k, seed + i, sheet) for i, name in enumerate(names[:count])]
    body = pack(sent, sheet)
    found = unpack(body, sheet, 6)

    assert body == pack(sent, sheet)
    assert len(body) <= size_limit(sheet, k)
    assert [(x.id, x.size, x.ids.tolist()) for x in found] == [(x.id, x.size, x.ids.tolist()) for x in sent]
    for x, y in zip(found, sent, strict=True):
        np.testing.assert_allclose(x.logprobs, y.logprobs, rtol=2**-11, atol=1e-6)
        truth = sheet.truths[x.id]
        assert nats_per_byte(x, truth, sheet.vocabulary) == pytest.approx(nats_per_byte(y, truth, sheet.vocabulary), rel=0.01)
        assert x.ids.dtype == np.int64
        assert x.logprobs.dtype == np.float32


def test_a_judgment_says_whose_it_is() -> None:
    """The sheet is asked for with it; knowledge without one is no judgment, and a judgment is no word of the server's."""
    asked: list[Judgment] = []

    def sheet(judgment: Judgment) -> Sheet:
        asked.append(judgment)
        return SHEET

    judgment, found = unpack_judgment(OWN_BODY, sheet, MOST, 4)
    assert (judgment, asked) == (JUDGMENT, [JUDGMENT])
    assert [(x.id, x.ids.tolist()) for x in found] == [(x.id, x.ids.tolist()) for x in unpack(BODY, SHEET)]
    with pytest.raises(WireError) as caught:
        unpack_judgment(BODY, sheet, MOST, 4)
    assert check_refusal(caught.value) == "bad-message"
    assert refusal(OWN_BODY) == "bad-message"
    boast = pack(KNOWN, SHEET, Judgment("phone", 3, -1, {}))
    with pytest.raises(WireError) as caught:
        unpack_judgment(boast, sheet, MOST, 4)
    assert check_refusal(caught.value) == "bad-message"
    assert len(asked) == 1


def test_bytes_of_knowledge() -> None:
    """2 bytes an id and 2 a log-probability, 6 a sample; 4 bytes an id from 65,537 tokens on."""
    assert data_size(3, 6, 4, V) == sum(t.nbytes for t in PARTS.values()) == 3 * 6 + 6 * 4 * 4
    assert data_size(3, 6, 4, 65_536) == 3 * 6 + 6 * 4 * 4
    assert data_size(3, 6, 4, 65_537) == 3 * 6 + 6 * 4 * 6
    big = replace(SHEET, vocabulary=65_537)
    assert load(zlib.decompress(pack([known("a", sheet=big)], big)))["ids"].dtype == np.uint32


def test_what_only_rounding_spoils_is_mended() -> None:
    """Minus infinity travels as the lowest number, a hair above 0 as 0: both are distributions, a sure truth still costs 0."""
    sure = one([7, 3], [1.0, 0.0])
    (found,) = unpack(pack([sure], SHEET), SHEET)
    assert found.logprobs.tolist() == [[0, LOWEST]]
    assert nats_per_byte(found, SHEET.truths["b"], V) == 0
    (found,) = unpack(pack([replace(sure, logprobs=np.array([[1e-4, -9.0]], np.float32))], SHEET), SHEET)
    assert found.logprobs.tolist() == [[0, -9]]


@pytest.mark.parametrize(
    "wrong",
    [
        replace(KNOWN[0], id="d"),
        replace(KNOWN[0], size=10),
        replace(KNOWN[0], size=-1),
        replace(KNOWN[0], ids=KNOWN[0].ids[:2], logprobs=KNOWN[0].logprobs[:2]),
        replace(KNOWN[0], ids=KNOWN[0].ids[:, :2]),
        replace(KNOWN[0], ids=KNOWN[0].ids - 60),
        replace(KNOWN[0], ids=KNOWN[0].ids + 60),
        replace(KNOWN[0], ids=np.zeros_like(KNOWN[0].ids)),
        replace(KNOWN[0], logprobs=KNOWN[0].logprobs + 2),
        replace(KNOWN[0], logprobs=KNOWN[0].logprobs * np.nan),
        replace(KNOWN[0], logprobs=KNOWN[0].logprobs + np.inf),
        KNOWN[1],
        known("ç", k=3),
    ],
)
def test_nobody_sends_what_nobody_would_accept(wrong: Knowledge) -> None:
    """Another sample, length, shape or token, no distribution, the same sample twice, another k."""
    with pytest.raises(DataError):
        pack([wrong, KNOWN[1]], SHEET)


def test_too_many_long_ids_are_split_by_the_sender() -> None:
    """A header has a limit, and who exceeds it is told before it sends."""
    truths = {f"{i:04d}" + "漢" * 60: Truth((1,), 1) for i in range(MAX_TEXTS)}
    sheet = Sheet("digest", V, truths)
    sent = [Knowledge(name, 1, np.array([[1]]), np.zeros((1, 1), np.float32)) for name in truths]

    with pytest.raises(DataError, match="fewer"):
        pack(sent, sheet)
    assert len(unpack(pack(sent[:1000], sheet), sheet, 1)) == 1000


@pytest.mark.parametrize(
    ("vocabulary", "truths"),
    [
        (1, {}),
        (1 << 21, {}),
        (V, {"": Truth((1,), 1)}),
        (V, {"x" * 65: Truth((1,), 1)}),
        (V, {"x\n": Truth((1,), 1)}),
        (V, {"x": Truth((), 1)}),
        (V, {"x": Truth((1,) * (MAX_POSITIONS + 1), 1)}),
        (V, {"x": Truth((1,), 0)}),
        (V, {"x": Truth((V,), 1)}),
        (V, {"x": Truth((-1,), 1)}),
        (V, {str(i): Truth((1,), 1) for i in range(MAX_TEXTS + 1)}),
    ],
)
def test_a_sheet_has_bounds(vocabulary: int, truths: dict[str, Truth]) -> None:
    """Names, answers, vocabulary and number of samples."""
    with pytest.raises(DataError):
        Sheet("digest", vocabulary, truths)


# Classes --------------------------------------------------------------------------------------------------------------
def test_what_a_class_costs() -> None:
    """-ln of its probability; what rounding left nothing still has half a level; no answer is worth nothing."""
    assert class_nats(Classes(np.array([0.25, 0.75], np.float32)), 0) == pytest.approx(math.log(4))
    assert class_nats(Classes(np.array([1.0, 0.0], np.float32)), 0) == 0
    assert class_nats(Classes(np.array([1.0, 0.0], np.float32)), 1) == pytest.approx(-math.log(LEVEL))
    assert class_nats(Classes(np.zeros(2, np.float32)), 1) == math.inf


# Hostile bytes --------------------------------------------------------------------------------------------------------
def change(name: str, at: tuple[int, ...], value: Any) -> bytes:
    return with_tensor(name, lambda tensor: tensor.__setitem__(at, value))


def test_right_changes_are_accepted() -> None:
    """The helpers of these tests break nothing by themselves."""
    assert len(unpack(packed(), SHEET, 4)) == 3
    assert unpack(change("ids", (0, 0), 49), SHEET)[0].ids[0, 0] == 49


@pytest.mark.parametrize(
    ("code", "body"),
    [
        ("not-finite", change("logprobs", (0, 0), math.nan)),
        ("not-finite", change("logprobs", (5, 3), math.inf)),
        ("not-finite", change("logprobs", (0, 0), -math.inf)),
        ("wrong-knowledge", with_tensor("logprobs", lambda t: t.__setitem__(0, math.log(0.26)))),
        ("wrong-knowledge", with_tensor("logprobs", lambda t: t.__setitem__(0, [0.001, -9, -9, -9]))),
        ("wrong-knowledge", change("ids", (0, 0), V)),
        ("wrong-knowledge", change("ids", (5, 3), 65_535)),
        ("wrong-knowledge", with_tensor("ids", lambda t: t.__setitem__((2, 0), t[2, 3]))),
        ("wrong-knowledge", change("sizes", (1,), 3)),
        ("wrong-knowledge", change("lengths", (1,), 2)),
        ("wrong-knowledge", packed(samples=["a", "b", "d"])),
        ("wrong-knowledge", packed(samples=["a", "b", "b"])),
        ("wrong-knowledge", packed(samples=["a", "b", "\x00" * 70])),
        ("wrong-knowledge", packed(tokenizer="another")),
        ("wrong-knowledge", packed(vocabulary=V + 1)),
        ("wrong-shape", packed(samples=["a", "b"])),
        ("wrong-shape", packed(samples=["b", "a", "ç", "b"][:1])),
        ("wrong-shape", packed(k=3)),
        ("wrong-shape", packed(k=5)),
        ("wrong-shape", packed(k=0)),
        ("wrong-shape", packed(k=0, tensors={"ids": np.empty((6, 0), np.uint16), "logprobs": np.empty((6, 0), np.float16)})),
        ("wrong-shape", packed(k=-1)),
        ("wrong-shape", packed(tensors={"more": np.zeros(1, np.uint8)})),
        ("wrong-shape", packed(tensors={"ids": PARTS["ids"].astype(np.uint32)})),
        ("wrong-shape", packed(tensors={"ids": PARTS["ids"].astype(np.float32)})),
        ("wrong-shape", packed(tensors={"logprobs": PARTS["logprobs"].view(np.uint16)})),
        ("wrong-shape", packed(tensors={"ids": np.zeros((MAX_POSITIONS + 1, 4), np.uint16)})),
        ("bad-message", packed("{}")),
        ("bad-message", packed("[")),
        ("bad-message", packed(more=1)),
        ("bad-message", packed(k="4")),
        ("bad-message", zlib.compress(save(PARTS))),
        ("bad-tensors", b""),
        ("bad-tensors", PLAIN),
        ("bad-tensors", BODY[:-1]),
        ("bad-tensors", BODY[: len(BODY) // 2]),
        ("bad-tensors", BODY + b"x"),
        ("bad-tensors", BODY + BODY),
        ("bad-tensors", zlib.compress(b"")),
        ("bad-tensors", zlib.compress(PLAIN[:-1])),
        ("bad-tensors", zlib.compress(PLAIN + b"x")),
        ("bad-tensors", zlib.compress(struct.pack("<Q", MAX_HEADER + 1) + PLAIN[8:])),
        ("too-large", zlib.compress(PLAIN + bytes(MAX_HEADER))),
        ("too-large", bytes(3 * MAX_HEADER)),
    ],
)
def test_hostile_knowledge_is_refused_by_name(code: str, body: bytes) -> None:
    """No distribution, other tokens, samples, lengths or shapes, no message, no safetensors, cut short, too long."""
    assert refusal(body) == code


def test_another_tokenizers_knowledge_is_refused() -> None:
    """The same samples, cut by a tokenizer with another vocabulary."""
    assert refusal(BODY, replace(SHEET, tokenizer="another")) == "wrong-knowledge"
    assert refusal(BODY, replace(SHEET, truths={**SHEET.truths, "b": Truth((7, 8), 2)})) == "wrong-shape"
    assert refusal(BODY, k=3) == "wrong-shape"


def test_a_tensor_lies_where_its_shape_says() -> None:
    """Overlapping tensors, and gaps."""
    length = struct.unpack("<Q", PLAIN[:8])[0]
    header = json.loads(PLAIN[8 : 8 + length])
    for name in PARTS:
        for by in (-2, 2):
            moved = {**header, name: {**header[name], "data_offsets": [at + by for at in header[name]["data_offsets"]]}}
            text = json.dumps(moved).encode()
            assert refusal(zlib.compress(struct.pack("<Q", len(text)) + text + PLAIN[8 + length :])) in (
                "bad-tensors",
                "wrong-shape",
            )


def test_a_bomb_costs_no_memory() -> None:
    """Sixty kilobytes that would be 64 megabytes, and a header that claims as much, are let go at the limit."""
    for bomb in (zlib.compress(bytes(1 << 26)), zlib.compress(PLAIN + bytes(1 << 26))):
        tracemalloc.start()
        code = refusal(bomb)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert code == "too-large"
        assert peak < 4 * MAX_HEADER


@strategies.fuzzing
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_never_surprise(body: bytes, compressed: bool) -> None:
    """Compressed or not, they are refused by name."""
    check_unpacked(zlib.compress(body) if compressed else body)


@strategies.fuzzing
@given(st.sampled_from([BODY, OWN_BODY]), st.booleans(), st.data())
def test_mutated_bytes_never_surprise(body: bytes, compressed: bool, data: st.DataObject) -> None:
    """Bytes changed, cut out and put in, before or after compression."""
    changed = bytearray(body if compressed else zlib.decompress(body))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed)))
        changed[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    check_unpacked(bytes(changed) if compressed else zlib.compress(bytes(changed)))


junk = st.none() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.lists(st.integers(-1, 2**40), max_size=3)


@strategies.fuzzing
@given(
    st.sampled_from([*PARTS, "__metadata__", "x"]),
    st.sampled_from(["dtype", "shape", "data_offsets", "message"]),
    junk,
    st.booleans(),
)
def test_mutated_headers_never_surprise(name: str, key: str, value: Any, whole: bool) -> None:
    """Anything in place of an entry, or of a part of one."""
    length = struct.unpack("<Q", PLAIN[:8])[0]
    header = json.loads(PLAIN[8 : 8 + length])
    header[name] = value if whole else {**header.get(name, {}), key: value}
    text = json.dumps(header).encode()
    check_unpacked(zlib.compress(struct.pack("<Q", len(text)) + text + PLAIN[8 + length :]))


@strategies.fuzzing
@given(st.sampled_from([*CONTENTS, "x"]), junk | st.lists(st.sampled_from(["a", "b", "ç", "\ud800"]), max_size=4))
def test_mutated_messages_never_surprise(key: str, value: Any) -> None:
    """Anything in place of what the message says."""
    check_unpacked(packed(**{key: value}))
