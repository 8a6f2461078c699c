"""Tokens of one model in terms of another's: which id stands for which, and where both have read the same; pure.

FedMKT (Fan et al. 2024, appendix B) and FuseLLM (Wan et al. 2024) pair tokens by edit distance and time warping, and teach
one token for sure wherever that fails. Here tokens are paired by their bytes and positions by the characters read so far;
whatever does not match is left out of the loss.

The position of token i says token i + 1. Where two models read different prompts, both are aligned over the answer alone, with
one zero-width entry for the prompt; see `answer_offsets`. Then the rows of an answer are the positions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge_sdk.errors import DataError
from edge_sdk.knowledge import MAX_VOCABULARY
from edge_sdk.training.batches import TopTokens

Ints = NDArray[np.int64]
Offsets = Sequence[tuple[int, int]]

NONE, EXACT, PREFIX = range(3)  # how a token was mapped
WAYS = ("none", "exact", "prefix")

NOTHING = -1e4  # the logarithm of no probability: its exponential is 0 in float32 at any temperature below 90, and it is finite
LEAST_MASS = 0.5  # of a position's probability that must have a counterpart


# Vocabularies ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens as bytes, in which a space stands for whatever it marks the start of a word with.

    Args:
        tokens: by id; None for what is no text: special and unknown tokens, and rows of the model without a token.
        digest: of ids and tokens as the tokenizer has them; who has the same means the same by an id.
        spares: ids of single bytes that the tokenizer uses only for characters it has no other token for.
        spaceless: the tokenizer drops spaces, so that it may mean `x` by ` x`.
        normalize: what the tokenizer does to text before it cuts it, e.g. lower case.
    """

    tokens: tuple[bytes | None, ...]
    digest: str
    spares: frozenset[int] = frozenset()
    spaceless: bool = False
    normalize: Callable[[str], str] = field(default=str, compare=False)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class VocabularyMap:
    """Args:
    ids: for each source id the target id, or -1. how: by which way, an index of `WAYS`.
    """

    ids: Ints
    how: NDArray[np.uint8]

    def shares(self) -> dict[str, float]:
        """The share of source ids mapped in each way."""
        return {way: float((self.how == i).mean()) if len(self.how) else 0.0 for i, way in enumerate(WAYS)}


def vocabulary(tokenizer: Tokenizer, size: int | None = None) -> Vocabulary:
    """What the ids of a tokenizer stand for: byte-level BPE, SentencePiece (BPE or unigram), WordPiece or whole words.

    Args:
        size: rows of the model's output, which may be more than the tokenizer has tokens; None for just these.

    Raises:
        DataError: the tokenizer has more tokens than that, or than MAX_VOCABULARY.
    """
    state = json.loads(tokenizer.to_str())
    model = state["model"]
    around = {name: state[name] for name in ("normalizer", "pre_tokenizer", "decoder")}
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    added = {int(token["id"]): bool(token["special"]) for token in state["added_tokens"]}
    count = max(ids.values(), default=-1) + 1
    if count > MAX_VOCABULARY:
        raise DataError(f"the tokenizer has an id beyond {MAX_VOCABULARY}")
    if size is not None and size < count:
        raise DataError(f"the tokenizer has {count} tokens, and the model only {size} rows for them")
    unknown = ids.get(model.get("unk_token") or "", model.get("unk_id"))
    byte_level, marked = "ByteLevel" in set(_types(around)), "▁" in json.dumps(around, ensure_ascii=False)
    spaceless = not byte_level and not marked
    spares: set[int] = set()
    tokens: list[bytes | None] = [None] * (size or count)
    for token, i in ids.items():
        if added.get(i, False) or i == unknown:
            continue
        if i in added:
            tokens[i] = token.encode()
        elif byte_level:
            tokens[i] = _of_bytes(token)
        elif model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            tokens[i] = bytes([int(token[3:5], 16)])
            spares.add(i)
        elif marked:
            tokens[i] = token.replace("▁", " ").encode()
        else:
            tokens[i] = _of_words(token, model)
    said = sorted((i, token, i in added) for token, i in ids.items())
    digest = hashlib.sha256(json.dumps([len(tokens), said]).encode()).hexdigest()
    return Vocabulary(tuple(tokens), digest, frozenset(spares), spaceless, _normalizer(tokenizer))


def _types(node: Any) -> Iterator[str]:
    """Every `type` inside a part of a tokenizer's description."""
    if isinstance(node, dict):
        yield from ([node["type"]] if isinstance(node.get("type"), str) else [])
        node = list(node.values())
    if isinstance(node, list):
        for inner in node:
            yield from _types(inner)


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE (Radford et al. 2019, GPT-2) writes bytes with; visible ones stand for themselves."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_alphabet()


def _of_bytes(token: str) -> bytes:
    return bytes(BYTES[c] for c in token) if all(c in BYTES for c in token) else token.encode()


def _of_words(token: str, model: Mapping[str, Any]) -> bytes:
    """A piece of a word, or a word with a space before it; signs stand for themselves."""
    prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    if suffix:
        return token.removesuffix(suffix).encode()
    if prefix and token.startswith(prefix) and token != prefix:
        return token.removeprefix(prefix).encode()
    starts = bool(prefix or model["type"] == "WordLevel") and any(c.isalnum() for c in token)
    return (" " * starts + token).encode()


def _normalizer(tokenizer: Tokenizer) -> Callable[[str], str]:
    inner = tokenizer.normalizer
    if inner is None:
        return str

    def normalize(text: str) -> str:
        """Of what follows the leading spaces; a mark or a space that the normalizer adds is no part of the text."""
        bare = text.lstrip(" ")
        found = str(inner.normalize_str(bare)).replace("▁", " ").strip(" ") if bare.strip() else ""
        return text[: len(text) - len(bare)] + found if found else text

    return normalize


def vocabulary_map(source: Vocabulary, target: Vocabulary, same: Mapping[int, int] | None = None) -> VocabularyMap:
    """For each token of the source the target token that begins a text which begins with it.

    1. exact: the same bytes, after the target's own normalization.
    2. prefix: the longest token that these bytes begin with. It is what a target that has no such token would say first.
       A prefix is more than spaces.

    Ties go to the lowest id. A tokenizer's own special tokens are mapped by `same` alone: what ends a text, above all.

    Args:
        same: source ids that mean the same as target ids.

    Raises:
        DataError: `same` names an id that a vocabulary lacks.
    """
    if source.digest == target.digest:
        found = VocabularyMap(np.arange(len(source)), np.full(len(source), EXACT, np.uint8))
    else:
        found = VocabularyMap(np.full(len(source), -1, np.int64), np.zeros(len(source), np.uint8))
        index = _index(target)
        for i, token in enumerate(source.tokens):
            if token:
                found.ids[i], found.how[i] = _counterpart(_spellings(token, source, target), index)
    for own, other in (same or {}).items():
        if not 0 <= own < len(source) or not 0 <= other < len(target):
            raise DataError(f"{own} -> {other} names a token that one of the vocabularies lacks")
        found.ids[own], found.how[own] = other, EXACT
    return found


def _index(vocabulary: Vocabulary) -> dict[bytes, int]:
    """The lowest id of each token; that of a spare byte only where no other token is the same."""
    index: dict[bytes, int] = {}
    for i in sorted(range(len(vocabulary)), key=lambda i: (i in vocabulary.spares, i)):
        if token := vocabulary.tokens[i]:
            index.setdefault(token, i)
    return index


def _spellings(token: bytes, source: Vocabulary, target: Vocabulary) -> list[bytes]:
    """What the target would read a token as, the likeliest first."""
    with suppress(UnicodeDecodeError):  # a part of a character: nothing to normalize
        token = target.normalize(token.decode()).encode()
    if not source.spaceless and not target.spaceless:
        return [token]
    return [token, token[1:] if token.startswith(b" ") else b" " + token]


def _counterpart(spellings: Sequence[bytes], index: Mapping[bytes, int]) -> tuple[int, int]:
    for spelling in spellings:
        if spelling in index:
            return index[spelling], EXACT
    for spelling in spellings:
        for length in range(len(spelling) - 1, 0, -1):
            if spelling[:length].strip() and spelling[:length] in index:
                return index[spelling[:length]], PREFIX
    return -1, NONE


# Positions ------------------------------------------------------------------------------------------------------------
Mark = tuple[int, int]  # characters read, and what is said next
JOINED, SPACED, SPACES, END = range(4)  # a word without, and with the space before it; nothing but spaces; the end


def answer_offsets(tokenizer: Tokenizer, answer: str, ended: bool = True) -> list[tuple[int, int]]:
    """Offsets of an answer's tokens after a prompt that counts as one entry of no width, and before an end that does.

    Args:
        answer: as it is tokenized, with its leading space.
        ended: an end token follows.
    """
    offsets = tokenizer.encode(answer, add_special_tokens=False).offsets
    return [(0, 0), *((int(begin), int(end)) for begin, end in offsets), *([(0, 0)] if ended else [])]


def align(text: str, source: Offsets, target: Offsets, start: int = 0, whole: bool = False) -> Ints:
    """For each position of the target that says a token of the answer, the position of the source that has read the same.

    Two positions meet where the text each has read ends at the same character. Spaces at that end do not count, as some
    tokenizers never see them, but both must say what comes next alike: a word with the space before it still to be said, a
    word whose space was said already, or nothing but spaces (then these must be as many). At the end of the text the
    positions meet that say the end. A position inside a character, or before another token of no width, says nothing of
    the text and meets none.

    Args:
        source, target: (begin, end) of each token of the same text, in characters; special tokens have no width.
        start: the character at which the answer begins, its leading space included.
        whole: meet only where the source's next token is as long as the target's or longer. Where it is shorter, the source says
            a piece that the target never says there; where it is longer, the target says the beginning of it (`PREFIX`).

    Returns:
        (len(target) - 1,) positions of the source, ascending, -1 for none. The last token says nothing.

    Raises:
        DataError: an offset or the start lies outside the text.
    """
    there = {mark: i for i, mark in enumerate(_marks(text, source, start)) if mark is not None}
    found = [-1 if mark is None else there.get(mark, -1) for mark in _marks(text, target, start)]
    if whole:
        lengths = zip(found, target[1:], strict=False)  # the ends of a text have no width and stay
        found = [i if i >= 0 and (begin == end or source[i + 1][1] >= end) else -1 for i, (begin, end) in lengths]
    return np.array(found, np.int64)


def _marks(text: str, offsets: Offsets, start: int) -> list[Mark | None]:
    """What each position has read and what it says next, as far as they must be the same; no two have the same."""
    if not 0 <= start <= len(text) or any(not 0 <= begin <= end <= len(text) for begin, end in offsets):
        raise DataError(f"offsets or a start lie outside a text of {len(text)} characters")
    seen, ahead = _visible(text)
    read, over = 0, False
    marks: list[Mark | None] = []
    for (_, end), (next_begin, next_end) in pairwise(offsets):
        read, mark = max(read, end), None
        if next_begin == next_end:
            if seen[read] == seen[-1] and not over:
                mark, over = (seen[-1], END), True
        elif next_begin >= read and next_end > start and seen[read] >= seen[start]:
            word = (seen[read], SPACED if read < ahead[read] else JOINED)
            mark = word if next_end > ahead[read] else (read, SPACES)
        marks.append(mark)
    return marks


def _visible(text: str) -> tuple[list[int], list[int]]:
    """For each place in a text, where what is before it ends without spaces, and where what is no space begins after it."""
    seen, ahead = [0] * (len(text) + 1), [len(text)] * (len(text) + 1)
    for i, c in enumerate(text):
        seen[i + 1] = seen[i] if c.isspace() else i + 1
    for i in range(len(text) - 1, -1, -1):
        ahead[i] = ahead[i + 1] if text[i].isspace() else i
    return seen, ahead


# Distributions --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Translated:
    """A teacher's likeliest tokens in the ids of another tokenizer, the likeliest first.

    Args:
        ids: (m, k); where fewer than k are left, the first one again.
        logprobs: (m, k), renormalized over what is left; `NOTHING` where nothing is.
        mass: (m,) the share of what was sent that has a counterpart, between 0 and 1.
        kept: (m,) whether that is enough to learn from.
    """

    ids: Ints
    logprobs: NDArray[np.float32]
    mass: NDArray[np.float64]
    kept: NDArray[np.bool_]


def translate(ids: Ints, logprobs: NDArray[np.floating], mapping: Ints, least: float = LEAST_MASS) -> Translated:
    """Top-k log-probabilities (m, k) of the source, by ids of the target.

    Source tokens with the same counterpart add up, p = sum of p_i (the original takes the first of them); those without one
    are dropped, and the rest is divided by its sum. The probability that the source left outside its top k is not missed.

    Args:
        mapping: for each source id the target id, or -1.
        least: positions of which less has a counterpart are not kept; one of which nothing has never is.

    Raises:
        DataError: shapes differ, an id is not in the vocabulary, or a log-probability is NaN or positive infinity.
    """
    if ids.ndim != 2 or ids.shape != logprobs.shape:
        raise DataError(f"ids {ids.shape} and log-probabilities {logprobs.shape} are not alike, (positions, k)")
    if ids.size and not 0 <= ids.min() <= ids.max() < len(mapping):
        raise DataError(f"a token id is not in the vocabulary of {len(mapping)}")
    if np.isnan(logprobs).any() or np.isposinf(logprobs).any():
        raise DataError("a log-probability is NaN or infinite")
    m, k = ids.shape
    found = Translated(np.zeros((m, k), np.int64), np.full((m, k), NOTHING, np.float32), np.zeros(m), np.zeros(m, bool))
    highest = logprobs.max(1, initial=NOTHING).astype(np.float64)
    for row, (own, sent, top) in enumerate(zip(mapping[ids], logprobs.astype(np.float64), highest, strict=True)):
        there, where = np.unique(own[own >= 0], return_inverse=True)
        sums = np.full(len(there), -np.inf)
        np.logaddexp.at(sums, where, sent[own >= 0] - top)
        left = float(np.exp(sums).sum())
        if left == 0:
            continue
        order = np.lexsort((there, -sums))
        found.ids[row] = there[order[0]]
        found.ids[row, : len(order)] = there[order]
        found.logprobs[row, : len(order)] = np.maximum(sums[order] - math.log(left), NOTHING)
        found.mass[row] = min(left / float(np.exp(sent - top).sum()), 1.0)
    found.kept[:] = (found.mass >= least) & (found.mass > 0)
    return found


def taught(translated: Translated, positions: Ints, start: int, first: int = 0) -> TopTokens | None:
    """What a sequence learns of its answer, for `losses.top_k`; None where no position can be learned from.

    That loss renormalizes the student over the k columns of a row, so that a column of no probability would not be neutral:
    it pushes that token down. Therefore

    - a row with fewer than k tokens is filled by repeating them, the least likely first, each as likely as it is. The loss
      weighs the repeated ones more, and is still least, and 0, exactly where student and teacher agree on these tokens;
    - a row that teaches nothing is one token k times: its loss and gradient are 0 whatever the student says.

    Args:
        positions: for each row of the answer the source's position, or -1.
        start: of the answer among the sequence's tokens, as `TopTokens` has it.
        first: the source's position that `translated` begins with.

    Raises:
        DataError: a position lies outside what was translated.
    """
    rows = np.where(positions >= 0, positions - first, -1)
    m, k = translated.ids.shape
    if ((positions >= 0) & (rows < 0)).any() or (rows >= m).any():
        raise DataError(f"a position is none of the {m} that were translated")
    ids, logprobs = np.zeros((len(rows), k), np.int64), np.full((len(rows), k), -math.log(max(k, 1)), np.float32)
    learned = [(to, row) for to, row in enumerate(rows) if row >= 0 and translated.kept[row]]
    for to, row in learned:
        filled = int((translated.logprobs[row] > NOTHING).sum())
        columns = np.tile(np.arange(filled)[::-1], -(-k // filled))[:k]
        ids[to], logprobs[to] = translated.ids[row, columns], translated.logprobs[row, columns]
    return TopTokens(start, ids, logprobs) if learned else None
