"""Tokens across tokenizers: maps and positions worked out by hand, and that nothing is ever paired wrongly."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from bench import fleet
from edge_sdk.alignment import (
    EXACT,
    NONE,
    NOTHING,
    PREFIX,
    Translated,
    Vocabulary,
    align,
    answer_offsets,
    taught,
    translate,
    vocabulary,
    vocabulary_map,
)
from edge_sdk.errors import DataError
from edge_sdk.training import losses
from tests import strategies  # noqa: F401  # its hypothesis profile

CORPUS = [
    *("the film was good and the plot was not bad", "a wonderful film, truly wonderful!", "well-known (bad) films"),
    *("naïve café 🙂 漢字 x🙂x é🙂漢 a漢b", "Good Bad The A. b? é , - ( ) ! aé", "noun  unfold goods badly film.\nfilms"),
]
texts = st.lists(st.sampled_from([*"abdefglmnoé🙂漢.,!(-", " ", "  ", "\n", "Good", "film", "wonder", "bad"]), max_size=14).map(
    "".join
)


def trained(model: Any, trainer: Any, pre_tokenizer: Any, decoder: Any = None, normalizer: Any = None) -> Tokenizer:
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        made.decoder = decoder
    if normalizer is not None:
        made.normalizer = normalizer
    made.train_from_iterator(CORPUS * 20, trainer)
    return made


def byte_level(size: int, trim: bool = True) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False)
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim)
    return trained(models.BPE(), trainer, cut, decoders.ByteLevel())


def unigram() -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=110, special_tokens=["<unk>", "<end>"], unk_token="<unk>", show_progress=False)  # noqa: S106
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(prepend_scheme="never"), decoders.Metaspace())


def word_piece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=140, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    made = models.WordPiece(unk_token="[UNK]")  # noqa: S106
    return trained(made, trainer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(), normalizers.BertNormalizer())


TOKENIZERS = {
    "bytes": byte_level(300),
    "more bytes": byte_level(360, trim=False),
    "unigram": unigram(),
    "word pieces": word_piece(),
}
PAIRS = list(product(TOKENIZERS, TOKENIZERS))


def hand_made(*tokens: str, spaceless: bool = False, spares: frozenset[int] = frozenset()) -> Vocabulary:
    """A vocabulary of these tokens; `-` is no text."""
    found = tuple(None if token == "-" else token.encode() for token in tokens)  # noqa: S105
    return Vocabulary(found, repr((tokens, spaceless, spares)), spares, spaceless)


def mapped(source: Vocabulary, target: Vocabulary, **options: Any) -> tuple[list[int], list[int]]:
    found = vocabulary_map(source, target, **options)
    return found.ids.tolist(), found.how.tolist()


# Vocabularies ---------------------------------------------------------------------------------------------------------
def test_byte_level_tokens_are_bytes() -> None:
    """Ġ is a space, Ċ a line break, é its two bytes; half of it is one; what is no text has none."""
    made = Tokenizer(models.BPE({"Ġgood": 0, "Ċ": 1, "cafÃ©": 2, "Ã": 3, "<end>": 4}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.add_special_tokens(["<end>"])
    made.add_tokens([AddedToken("Ġx", normalized=False)])
    found = vocabulary(made, 8)

    assert found.tokens == (b" good", b"\n", "café".encode(), b"\xc3", None, "Ġx".encode(), None, None)
    assert not found.spaceless


def test_sentencepiece_tokens_are_bytes() -> None:
    """▁ is a space, <0xC3> one byte that is used only where nothing else fits, the unknown token no text."""
    pieces = [("<unk>", 0.0), ("▁good", -1.0), ("▁", -2.0), ("<0x41>", -9.0), ("A", -3.0), ("<0xC3>", -9.0)]
    made = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    found = vocabulary(made)

    assert found.tokens == (None, b" good", b" ", b"A", b"A", b"\xc3")
    assert found.spares == {3, 5}
    assert mapped(hand_made("A"), found) == ([4], [EXACT])


def test_word_pieces_are_words_with_a_space_and_pieces_without() -> None:
    """A word starts after a space, `##` goes on, signs stand for themselves; whole words alike."""
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "good": 1, "##s": 2, ".": 3, "##": 4}, unk_token="[UNK]"))  # noqa: S106
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 1, ".": 2}, unk_token="[UNK]"))  # noqa: S106

    assert vocabulary(made).tokens == (None, b" good", b"s", b".", b"##")
    assert vocabulary(words).tokens == (None, b" good", b".")
    ended = Tokenizer(models.BPE({"good</w>": 0, "s": 1}, [], end_of_word_suffix="</w>"))
    assert vocabulary(ended).tokens == (b"good", b"s")
    assert vocabulary(made).spaceless
    assert vocabulary(words).spaceless
    assert vocabulary(ended).spaceless


def test_a_model_has_at_least_as_many_rows_as_tokens() -> None:
    """More rows are no text; fewer cannot be."""
    assert len(vocabulary(TOKENIZERS["unigram"], 999)) == 999
    with pytest.raises(DataError, match="rows"):
        vocabulary(TOKENIZERS["unigram"], 5)


def test_a_digest_names_ids_and_tokens_and_nothing_else() -> None:
    """Truncation does not matter; one more token, or one more row, does."""
    made = byte_level(300)
    before = vocabulary(made).digest
    made.enable_truncation(5)
    assert vocabulary(made).digest == before == vocabulary(TOKENIZERS["bytes"]).digest
    assert vocabulary(made, 400).digest != before
    made.add_tokens(["new"])
    assert vocabulary(made).digest != before


def test_a_map_by_hand() -> None:
    """The same, the longest beginning, nothing; the special token by name."""
    source = hand_made("-", " good", " goods", "good", " x", "-", "")
    target = hand_made(" go", " good", "-", "g", "go")

    assert mapped(source, target, same={0: 2}) == ([2, 1, 1, 4, -1, -1, -1], [EXACT, EXACT, PREFIX, PREFIX, NONE, NONE, NONE])
    assert vocabulary_map(source, target).shares() == {"none": 4 / 7, "exact": 1 / 7, "prefix": 2 / 7}


def test_a_prefix_is_more_than_spaces() -> None:
    """A lone space says nothing of the word after it, but two spaces begin with one."""
    assert mapped(hand_made(" x", "  "), hand_made(" ")) == ([-1, -1], [NONE, NONE])
    assert mapped(hand_made(" x", "  "), hand_made(" ", "  ")) == ([-1, 1], [NONE, EXACT])


def test_ties_go_to_the_lowest_id_but_not_to_a_spare_byte() -> None:
    """Of two ids of the same token the first counts, unless it is a byte that the tokenizer uses only when it must."""
    assert mapped(hand_made("A"), hand_made("-", "A", "A"))[0] == [1]
    assert mapped(hand_made("A"), hand_made("-", "A", "A", spares=frozenset({1})))[0] == [2]
    assert mapped(hand_made("A"), hand_made("-", "A", spares=frozenset({1})))[0] == [1]


def test_a_tokenizer_without_spaces_may_mean_a_word_either_way() -> None:
    """Where one side drops spaces, ` x` is first what has the space, then what has none; else the space counts."""
    source = hand_made(" film", " .", "film", "s")
    pieces = hand_made(".", " film", "s", "film", spaceless=True)

    assert mapped(source, pieces) == ([1, 0, 3, 2], [EXACT] * 4)
    assert mapped(pieces, hand_made(" .", " film", " s")) == ([0, 1, 2, 1], [EXACT] * 4)
    assert mapped(source, hand_made("film", "."))[0] == [-1, -1, 0, -1]


def test_a_target_reads_tokens_as_it_reads_text() -> None:
    """A target without capitals or accents takes ` Café` for ` cafe`; the other way round nothing is made up."""
    pieces = {"[UNK]": 0, "cafe": 1, "##s": 2}
    made = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))  # noqa: S106
    made.normalizer = normalizers.BertNormalizer()
    target = vocabulary(made)

    assert mapped(hand_made(" Café", "S", " CAFES"), target) == ([1, 2, 1], [EXACT, EXACT, PREFIX])
    assert mapped(target, hand_made(" Café", " cafe")) == ([-1, 1, -1], [NONE, EXACT, NONE])


def test_a_mark_that_a_normalizer_adds_is_no_part_of_a_token() -> None:
    """Llama's normalizer writes ▁ before a text and for each space."""
    made = Tokenizer(models.BPE({"▁good": 0, "good": 1}, []))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])

    assert mapped(hand_made(" good", "good", " "), vocabulary(made)) == ([0, 1, -1], [EXACT, EXACT, NONE])


def test_what_means_the_same_must_exist() -> None:
    """An end token beyond a vocabulary, or a negative one, is a mistake."""
    for same in ({0: 1}, {1: 0}, {-1: 0}, {0: -1}):
        with pytest.raises(DataError, match="lacks"):
            vocabulary_map(hand_made("a"), hand_made("b"), same)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_means_the_same_as_itself(name: str) -> None:
    """Every id, special ones too, is its own counterpart."""
    found = vocabulary_map(vocabulary(TOKENIZERS[name]), vocabulary(TOKENIZERS[name]))

    assert found.ids.tolist() == list(range(len(found.ids)))
    assert (found.how == EXACT).all()


@pytest.mark.parametrize("name", ["bytes", "more bytes", "unigram"])
def test_renumbered_tokens_are_found_again(name: str) -> None:
    """The map to the same tokens in another order is that order."""
    source = vocabulary(TOKENIZERS[name])
    order = np.random.default_rng(0).permutation(len(source))
    target = Vocabulary(tuple(source.tokens[i] for i in order), "another")
    found = vocabulary_map(source, target).ids

    text = [i for i, token in enumerate(source.tokens) if token]
    assert [order[i] for i in found[text]] == text
    assert len(text) > 50


@pytest.mark.parametrize(("one", "other"), [pair for pair in PAIRS if pair[0] != pair[1]])
def test_whatever_is_mapped_begins_alike(one: str, other: str) -> None:
    """Exact counterparts have the same letters, prefixes the first of them; maps are the same every time."""
    source, target = vocabulary(TOKENIZERS[one]), vocabulary(TOKENIZERS[other])
    found, again = vocabulary_map(source, target), vocabulary_map(source, target)
    assert found.ids.tolist() == again.ids.tolist()
    assert (found.how == EXACT).mean() > 0.1
    for i in np.flatnonzero(found.ids >= 0):
        said, heard = source.tokens[i], target.tokens[found.ids[i]]
        assert said is not None
        assert heard is not None
        said, heard = said.strip(b" "), heard.strip(b" ")
        if target.normalize("É") == "e":
            said = target.normalize(said.decode(errors="replace")).strip().encode()
        assert said == heard if found.how[i] == EXACT else said.startswith(heard)


# Positions ------------------------------------------------------------------------------------------------------------
GOOD = "It was good."


def test_positions_by_hand() -> None:
    """`It| was| good|.` against `It| was| go|od|.|end`: all meet but the one inside `good`; each says the next token."""
    one = [(0, 2), (2, 6), (6, 11), (11, 12), (0, 0)]
    other = [(0, 2), (2, 6), (6, 9), (9, 11), (11, 12), (0, 0)]

    assert align(GOOD, one, other).tolist() == [0, 1, -1, 2, 3]
    assert align(GOOD, other, one).tolist() == [0, 1, 3, 4]
    assert align(GOOD, one, other, whole=True).tolist() == [0, 1, -1, 2, 3]
    assert align(GOOD, other, one, whole=True).tolist() == [0, -1, 3, 4]


def test_only_the_answer_counts() -> None:
    """The first position that counts is the one that has read the prompt; a token that begins in it is no answer."""
    one = [(0, 2), (2, 6), (6, 11), (11, 12), (0, 0)]

    assert align(GOOD, one, one, 6).tolist() == [-1, 1, 2, 3]
    assert align(GOOD, one, one, 7).tolist() == [-1, 1, 2, 3]
    assert align(GOOD, one, one, 8).tolist() == [-1, -1, 2, 3]
    assert align(GOOD, one, one, 12).tolist() == [-1, -1, -1, 3]
    spaces = [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert align("a  b", spaces, spaces, 3).tolist() == [-1, -1, 2]  # the prompt's own spaces are no answer
    assert align("a  b", spaces, spaces, 2).tolist() == [-1, 1, 2]


def test_it_does_not_matter_which_offsets_have_the_space() -> None:
    """Some tokenizers count a word's space as its own, some drop it; what was read ends alike."""
    within, without = [(0, 2), (2, 6), (6, 11), (11, 12)], [(0, 2), (3, 6), (7, 11), (11, 12)]

    assert align(GOOD, within, without).tolist() == align(GOOD, without, within).tolist() == [0, 1, 2]


def test_a_space_of_its_own_is_not_a_word() -> None:
    """After `was`, one says ` good` and the other only a space: no meeting, and none after the space either."""
    joined, apart = [(0, 6), (6, 11), (11, 12)], [(0, 6), (6, 7), (7, 11), (11, 12)]

    assert align(GOOD, joined, apart).tolist() == [-1, -1, 1]
    assert align(GOOD, apart, joined).tolist() == [-1, 2]
    assert align(GOOD, apart, apart).tolist() == [0, 1, 2]


def test_of_several_spaces_the_last_is_said_with_the_word() -> None:
    """`a|␣|␣b` against `a|b` without spaces: who has read the first space says what the other says after `a`."""
    text, spaces, none = "a  b", [(0, 1), (1, 2), (2, 4)], [(0, 1), (3, 4)]

    assert align(text, spaces, none).tolist() == [1]
    assert align(text, none, spaces).tolist() == [-1, 0]


def test_special_tokens_have_no_width_and_only_one_ends_a_text() -> None:
    """A start token says the first word, the last word says the end; nothing is said by what comes after it."""
    plain, special = [(0, 2), (2, 12)], [(0, 0), (0, 0), (0, 2), (2, 12), (0, 0), (0, 0)]

    assert align(GOOD, special, special).tolist() == [-1, 1, 2, 3, -1]
    assert align(GOOD, plain, special).tolist() == [-1, -1, 0, -1, -1]
    for whole in (False, True):
        assert align(GOOD, [(0, 0), *plain, (12, 12)], special, whole=whole).tolist() == [-1, 0, 1, 2, -1]
        assert align(GOOD, special, [(0, 0), *plain, (12, 12)], whole=whole).tolist() == [1, 2, 3]
    assert align(GOOD, [(0, 2), (0, 0), (2, 12)], plain).tolist() == [1]  # one in the middle has read what is before it


def test_spaces_at_the_end_of_a_text_do_not_hide_its_end() -> None:
    """One tokenizer says the spaces that follow the last word, one has never seen them; both say the end."""
    assert align("a ", [(0, 1), (1, 2), (0, 0)], [(0, 1), (0, 0)]).tolist() == [1]
    assert align("a ", [(0, 1), (0, 0)], [(0, 1), (1, 2), (0, 0)]).tolist() == [-1, 0]


def test_positions_inside_a_character_meet_none() -> None:
    """An emoji of three tokens says itself once: before the first of them and after the last."""
    text, parts, whole = "x🙂y", [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)]

    assert align(text, parts, whole).tolist() == [0, 3]
    assert align(text, whole, parts).tolist() == [0, -1, -1, 1]
    assert align(text, parts, parts).tolist() == [0, -1, -1, 3]


def test_nothing_to_align() -> None:
    """No tokens and one token say nothing."""
    assert align("a", [(0, 1)], []).tolist() == []
    assert align("a", [(0, 1)], [(0, 1)]).tolist() == []
    assert align("", [(0, 0), (0, 0)], [(0, 0), (0, 0)]).tolist() == [0]


@pytest.mark.parametrize(("offsets", "start"), [([(0, 9)], 0), ([(2, 1)], 0), ([(-1, 1)], 0), ([(0, 1)], 9), ([(0, 1)], -1)])
def test_offsets_lie_in_their_text(offsets: list[tuple[int, int]], start: int) -> None:
    """Those of another text are refused, on either side."""
    for pair in ((offsets, [(0, 1)]), ([(0, 1)], offsets)):
        with pytest.raises(DataError, match="outside"):
            align("abc", *pair, start)


def decoded(name: str, ids: list[int]) -> str:
    """What tokens spell, by their bytes and not by offsets; an incomplete character as �, a lost one as nothing."""
    tokens = vocabulary(TOKENIZERS[name]).tokens
    return b"".join(tokens[i] or b"" for i in ids).decode(errors="replace")


def squeezed(text: str) -> str:
    """Without spaces, case and accents: what all tokenizers here see."""
    return "".join(str(normalizers.BertNormalizer().normalize_str(text)).split())


@given(texts, st.sampled_from(PAIRS), st.booleans())
def test_whoever_meets_has_read_the_same(text: str, pair: tuple[str, str], whole: bool) -> None:
    """The tokens read so far spell the same text on both sides, the pairs ascend, and the last position says nothing."""
    text = " " + text
    encoded = [TOKENIZERS[name].encode(text, add_special_tokens=False) for name in pair]
    assume("[UNK]" not in encoded[0].tokens + encoded[1].tokens)
    source, target = (answer_offsets(TOKENIZERS[name], text) for name in pair)
    found = align(text, source, target, whole=whole)
    met = [(i, j) for j, i in enumerate(found.tolist()) if i >= 0]

    assert all(a < c and b < d for (a, b), (c, d) in pairwise(met))
    assert len(found) == len(encoded[1].ids) + 1
    for i, j in met:
        read = [decoded(name, list(e.ids[:n])) for name, e, n in zip(pair, encoded, (i, j), strict=True)]
        assert squeezed(read[0]) == squeezed(read[1])
        if "word pieces" not in pair:  # these see spaces: what follows begins with one on both sides or on neither
            assert read[0].rstrip() == read[1].rstrip()
            assert text.startswith(read[0])
            following = [
                decoded(name, [e.ids[n]]) if n < len(e.ids) else "" for name, e, n in zip(pair, encoded, (i, j), strict=True)
            ]
            assert following[0][:1].isspace() == following[1][:1].isspace()
            assert bool(following[0]) == bool(following[1])


@given(texts, st.sampled_from(list(TOKENIZERS)))
def test_a_tokenizer_meets_itself_everywhere(text: str, name: str) -> None:
    """The identity, but for positions inside a character."""
    offsets = answer_offsets(TOKENIZERS[name], " " + text)
    read = [max(end for _, end in offsets[: i + 1]) for i in range(len(offsets))]
    inside = [begin < end and begin < read[i] for i, (begin, end) in enumerate(offsets[1:])]

    found = align(" " + text, offsets, offsets)
    assert found.tolist() == [-1 if hidden else i for i, hidden in enumerate(inside)]


@given(texts, st.sampled_from(PAIRS))
def test_meeting_goes_both_ways(text: str, pair: tuple[str, str]) -> None:
    """Who meets whom does not depend on who teaches."""
    one, other = (answer_offsets(TOKENIZERS[name], text) for name in pair)
    there, back = align(text, one, other).tolist(), align(text, other, one).tolist()

    assert [(i, j) for j, i in enumerate(there) if i >= 0] == [(i, j) for i, j in enumerate(back) if j >= 0]


# Distributions --------------------------------------------------------------------------------------------------------
def logs(*rows: list[float]) -> NDArray[np.float32]:
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, np.float32))


def test_translation_by_hand() -> None:
    """.5 and .1 fall together, .2 has no counterpart: .6 / .8 and .2 / .8 are left, four fifths of all."""
    found = translate(np.array([[0, 1, 2, 3]]), logs([0.5, 0.2, 0.2, 0.1]), np.array([7, -1, 5, 7]))

    assert found.ids.tolist() == [[7, 5, 7, 7]]
    np.testing.assert_allclose(np.exp(found.logprobs), [[0.75, 0.25, 0, 0]], atol=1e-6)
    assert found.logprobs[0, 2:].tolist() == [NOTHING, NOTHING]
    assert found.mass == pytest.approx([0.8])
    assert found.kept.tolist() == [True]


def test_mass_is_the_share_of_what_was_sent() -> None:
    """Two tokens of probability .02 and .01, the first without a counterpart: a third is left, too little for a half."""
    ids, sent, mapping = np.array([[0, 1]]), logs([0.02, 0.01]), np.array([-1, 4])

    assert translate(ids, sent, mapping).mass == pytest.approx([1 / 3])
    assert translate(ids, sent, mapping).kept.tolist() == [False]
    assert translate(ids, sent, mapping, 0.3).kept.tolist() == [True]


def test_nothing_left_is_never_kept() -> None:
    """A position without any counterpart has no mass, whatever the threshold, and is finite all the same."""
    found = translate(np.array([[0, 1], [1, 0]]), logs([0.5, 0.5], [1.0, 0.0]), np.array([-1, -1]), 0.0)

    assert found.mass.tolist() == [0, 0]
    assert found.kept.tolist() == [False, False]
    assert np.isfinite(found.logprobs).all()


def test_no_probability_is_finite() -> None:
    """Minus infinity has a counterpart and says nothing; what is taught leaves it out."""
    found = translate(np.array([[0, 1]]), logs([1.0, 0.0]), np.array([3, 4]))
    learned = taught(found, np.array([0]), 1)

    assert found.logprobs.tolist() == [[0, NOTHING]]
    assert found.mass.tolist() == [1]
    assert learned is not None
    assert learned.ids.tolist() == [[3, 3]]


@given(st.integers(0, 6), st.integers(1, 8), st.integers(0, 10_000), st.booleans())
def test_translated_rows_are_distributions(m: int, k: int, seed: int, extreme: bool) -> None:
    """They add up to 1 or to nothing, name no token twice, keep at most all, and come in order."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(12)[:k] for _ in range(m)]) if m else np.empty((0, k), np.int64)
    sent = rng.normal(-2, 300 if extreme else 2, (m, k))
    sent = (sent - np.logaddexp.reduce(sent, 1, keepdims=True)).astype(np.float32)
    found = translate(ids, sent, rng.integers(-1, 5, 12))

    assert found.ids.shape == found.logprobs.shape == (m, k)
    assert ((found.mass >= 0) & (found.mass <= 1)).all()
    assert np.isfinite(found.logprobs).all()
    for row in range(m):
        p = np.exp(found.logprobs[row].astype(np.float64))
        assert p.sum() == pytest.approx(float(found.mass[row] > 0), abs=1e-5)
        assert len(set(found.ids[row, p > 0])) == (p > 0).sum()
        assert (np.diff(found.logprobs[row]) <= 0).all()
        assert (found.ids[row] >= 0).all()


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 10_000))
def test_the_identity_changes_nothing(m: int, k: int, seed: int) -> None:
    """All mass is kept, the same tokens have the same probabilities relative to each other."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(20)[:k] for _ in range(m)])
    sent = np.log(-np.sort(-rng.dirichlet([0.5] * 20, m) - 1e-6, axis=1)[:, :k]).astype(np.float32)
    found = translate(ids, sent, np.arange(20))

    assert found.ids.tolist() == ids.tolist()
    np.testing.assert_allclose(found.logprobs, sent - np.logaddexp.reduce(sent, 1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(found.mass, 1)
    assert found.kept.all()


def test_what_cannot_be_translated() -> None:
    """Other shapes, ids beyond the map, NaN and infinity."""
    right, mapping = logs([0.5, 0.5]), np.array([0, 1])
    for ids, sent in (
        (np.array([[0, 1, 0]]), right),
        (np.array([0, 1]), right[0]),
        (np.array([[0, 2]]), right),
        (np.array([[-1, 1]]), right),
        (np.array([[0, 1]]), right * np.nan),
        (np.array([[0, 1]]), -right * np.inf),
    ):
        with pytest.raises(DataError):
            translate(ids, sent, mapping)


def test_what_is_taught_by_hand() -> None:
    """Rows go where they belong; a short row repeats its tokens, least likely first; what teaches nothing is one token."""
    ids = np.array([[7, 5, 7, 7], [3, 2, 1, 0], [9, 9, 9, 9]])
    sent = np.concatenate([logs([0.75, 0.25, 0, 0], [0.4, 0.3, 0.2, 0.1]), np.full((1, 4), NOTHING, np.float32)]).clip(NOTHING)
    translated = Translated(ids, sent, np.array([1, 1, 0.0]), np.array([True, True, False]))
    found = taught(translated, np.array([11, -1, 10, 12]), 5, first=10)

    assert found is not None
    assert found.start == 5
    assert found.ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0], [5, 7, 5, 7], [0, 0, 0, 0]]
    np.testing.assert_allclose(np.exp(found.logprobs[[0, 2]]), [[0.1, 0.2, 0.3, 0.4], [0.25, 0.75] * 2], atol=1e-6)
    assert taught(translated, np.array([-1, 12]), 5, first=10) is None
    for position in (9, 13):
        with pytest.raises(DataError, match="none of the 3"):
            taught(translated, np.array([position]), 5, first=10)


@given(st.integers(1, 8), st.integers(0, 10_000))
def test_the_loss_is_least_where_the_student_agrees(filled: int, seed: int) -> None:
    """However few tokens are left of 8: a student with their proportions has loss and gradient 0, another has more loss.

    Columns of no probability would not do: they teach even a student that agrees.
    """
    rng = np.random.default_rng(seed)
    mapping = np.where(np.arange(8) < filled, rng.permutation(30)[:8], -1)
    sent = np.log(rng.dirichlet([1.0] * 8) + 1e-4).astype(np.float32)[None]
    translated = translate(np.arange(8)[None], sent, mapping, 0.0)
    found = taught(translated, np.array([0, -1]), 1)
    assert found is not None

    def loss(student: NDArray[np.float64], ids: NDArray[np.int64], logprobs: NDArray[np.float32]) -> tuple[float, float, float]:
        hidden = torch.tensor(np.stack([student, student]), dtype=torch.float32, requires_grad=True)
        values = losses.top_k(hidden, torch.eye(30), torch.from_numpy(ids), torch.from_numpy(logprobs))
        values.sum().backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        return values[0].item(), values[1].item(), float(hidden.grad.abs().max())

    agrees = rng.normal(0, 1, 30)
    agrees[mapping[:filled]] = sent[0, :filled] + 3
    assert loss(agrees, found.ids, found.logprobs) == pytest.approx((0, 0, 0), abs=1e-5)
    differs = agrees.copy()
    differs[mapping[0]] += 2
    assert (loss(differs, found.ids, found.logprobs)[0] > 1e-5) == (filled > 1)
    if filled < 8:
        padded = np.tile(translated.ids, (2, 1)), np.tile(translated.logprobs, (2, 1))
        value = loss(agrees, *padded)[0]
        assert math.isfinite(value)
        assert value > 1e-3


# Real tokenizers ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_tokenizers_meet_at_most_positions() -> None:
    """SmolLM2's byte-level BPE and MiniLM's WordPiece on real sentences: most positions, where the true token is mapped right.

    MiniLM has no capitals, so that SmolLM2 learns fewer true tokens from it.
    """
    found = [Tokenizer.from_file(str(fleet.bundle_of(slm) / "tokenizer.json")) for slm in ("smollm2", "minilm")]
    for tokenizer in found:
        tokenizer.no_truncation()
        tokenizer.no_padding()
    smol, mini = map(vocabulary, found)
    sentences = [" " + e.text for domain in fleet.domains().values() for e in domain.train[:13]]
    offsets = [[answer_offsets(tokenizer, text) for tokenizer in found] for text in sentences]

    for source, target, mapping, least in ((0, 1, vocabulary_map(smol, mini), 0.96), (1, 0, vocabulary_map(mini, smol), 0.8)):
        met = positions = right = words = 0
        for text, pair in zip(sentences, offsets, strict=True):
            found_positions = align(text, pair[source], pair[target], whole=True)
            met, positions = met + int((found_positions >= 0).sum()), positions + len(found_positions)
            ids = [list(tokenizer.encode(text, add_special_tokens=False).ids) for tokenizer in found]
            for j in np.flatnonzero(found_positions[:-1] >= 0):  # the last says the end
                right += int(mapping.ids[ids[source][found_positions[j]]] == ids[target][j])
                words += 1
        assert 0.8 < met / positions < 0.95
        assert right / words > least
        assert mapping.shares()["exact"] > 0.55
