"""What one model says of public answers as another can learn it: worked out by hand, and never more than was said."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edge_sdk import exchange, knowledge, wire
from edge_sdk.alignment import vocabulary_map
from edge_sdk.bundle import File
from edge_sdk.engines import TopK
from edge_sdk.errors import DataError, WireError
from edge_sdk.exchange import POSITIONS, Heard, Voice
from edge_sdk.knowledge import LOWEST, Knowledge, Sheet, Truth
from edge_sdk.protocol import Text, Told
from edge_sdk.tasks import Task
from edge_sdk.tokens import PromptEncoder
from edge_sdk.training import losses
from edge_sdk.training.batches import Answer, Row, TopTokens
from tests import strategies
from tests.test_alignment import TOKENIZERS

ASK = Task((), "{text} is ", (), max_tokens=8, answer_tokens=6)  # it ends in a space: answers begin without one
JOINED = msgspec.structs.replace(ASK, pattern="{text} is")


def bpe(tokens: Sequence[str], *merges: tuple[str, str]) -> Tokenizer:
    """Byte-level BPE with these tokens by id, `Ġ` for a space; `<end>` is special."""
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return made


LETTERS = bpe(["Ġ", "a", "b", "c", "<end>"])
PIECES = bpe(["a", "b", "c", "Ġ", "ab", "ac", "<end>"], ("a", "b"), ("a", "c"))
SPACE, A, B, C, END = range(5)  # of letters


def voice(tokenizer: Tokenizer, end: int | None = None, task: Task = ASK) -> Voice:
    return Voice(PromptEncoder(tokenizer.to_str(), (), (), POSITIONS, task), end)


LETTER_BY_LETTER, IN_PIECES = voice(LETTERS, END), voice(PIECES, 6)


def public(*answers: str) -> list[Text]:
    return [Text(f"p{i}", "abc", 0, answer) for i, answer in enumerate(answers)]


def known(name: str, size: int, *positions: dict[int, float]) -> Knowledge:
    """What is said at each position: tokens and their probabilities, the likeliest first."""
    ids = np.array([list(p) for p in positions], np.int64)
    return Knowledge(name, size, ids, np.log(np.array([list(p.values()) for p in positions], np.float32)))


def sure(who: Voice, texts: Sequence[Text], *shares: float) -> list[Knowledge]:
    """Somebody who gives each token of a text's answer this share, and half as much of the rest to another token."""
    found = []
    for text, share in zip(texts, shares, strict=True):
        truth = exchange.sheet(who, texts).truths[text.id]
        said = [{token: share, (token + 1) % len(who.vocabulary): (1 - share) / 2} for token in truth.tokens]
        found.append(known(text.id, truth.size, *said))
    return found


def top(row: Row) -> TopTokens:
    assert isinstance(row.target, TopTokens)
    return row.target


def dealt(target: TopTokens, position: int) -> list[tuple[int, Any]]:
    """Each column of a position: a token and its probability."""
    pairs = zip(target.ids[position].tolist(), np.exp(target.logprobs[position]).tolist(), strict=True)
    return [(token, pytest.approx(p, rel=1e-5)) for token, p in pairs]


# How answers are spelled ----------------------------------------------------------------------------------------------
def test_an_answer_in_the_tokens_of_two_models() -> None:
    """Letters, or pieces; an end where a model has one; bytes of UTF-8 without spaces around; whose tokens they are."""
    texts = public("ab", " cab ")

    assert exchange.sheet(LETTER_BY_LETTER, texts) == Sheet(
        LETTER_BY_LETTER.vocabulary.digest, 5, {"p0": Truth((A, B, END), 2), "p1": Truth((C, A, B, END), 3)}
    )
    assert exchange.sheet(voice(PIECES), texts) == Sheet(
        IN_PIECES.vocabulary.digest, 7, {"p0": Truth((4,), 2), "p1": Truth((2, 4), 3)}
    )
    assert exchange.sheet(voice(TOKENIZERS["bytes"]), public("é 漢")).truths["p0"].size == 6
    assert exchange.sheet(voice(LETTERS, task=JOINED), public("b")).truths["p0"].tokens == (SPACE, B)
    assert LETTER_BY_LETTER.vocabulary.digest != IN_PIECES.vocabulary.digest


def test_where_the_tokens_of_an_answer_lie() -> None:
    """One entry for the prompt, one for each token, and one without width for the end, which a cut answer does not have."""
    cut = msgspec.structs.replace(ASK, answer_tokens=2)

    assert LETTER_BY_LETTER.offsets("abc", 4) == [(0, 0), (0, 1), (1, 2), (2, 3), (0, 0)]
    assert voice(LETTERS).offsets("abc", 3) == [(0, 0), (0, 1), (1, 2), (2, 3)]
    assert voice(LETTERS, END, cut).offsets("abc", 2) == [(0, 0), (0, 1), (1, 2)]
    assert voice(LETTERS, None, cut).offsets("abc", 2) == [(0, 0), (0, 1), (1, 2)]
    assert voice(PIECES, 6, JOINED).offsets("ab", 3) == [(0, 0), (0, 1), (1, 3), (0, 0)]
    assert exchange.sheet(voice(LETTERS, END, cut), public("abc")).truths["p0"] == Truth((A, B), 2)


@pytest.mark.parametrize(
    ("tokenizer", "answer", "sizes"),
    [
        (LETTERS, " abc ", [1, 1, 2, 3, 3]),  # the prompt, three letters, the end
        (PIECES, "abc", [1, 2, 3, 3]),
        (TOKENIZERS["bytes"], "é漢", [1, 2, 5, 5, 5, 5]),  # é, and three bytes of 漢
    ],
)
def test_bytes_that_were_read_of_an_answer(tokenizer: Tokenizer, answer: str, sizes: list[int]) -> None:
    """Of a cut answer only what its tokens have read, a character from its first byte on; never nothing."""
    who = voice(tokenizer, 0)

    assert [who.size(answer, tokens) for tokens in range(len(sizes))] == sizes


def test_a_tokenizer_whose_answer_is_cut_has_no_advantage() -> None:
    """Twelve letters at six tokens each: letters at .5 say half the answer and lose to pieces at .45 that say all of it."""
    texts = public("abacab" * 2)
    letters, pieces = (sure(who, texts, share) for who, share in ((LETTER_BY_LETTER, 0.5), (IN_PIECES, 0.45)))
    (row,), chosen = exchange.lessons(IN_PIECES, texts, pieces, [(LETTER_BY_LETTER, letters)], 0.9)
    (prompt,) = IN_PIECES.encoder.prompts(["abc"])

    assert exchange.sheet(LETTER_BY_LETTER, texts).truths["p0"] == Truth((A, B, A, C, A, B), 6)
    assert exchange.sheet(IN_PIECES, texts).truths["p0"] == Truth((4, 5, 4, 4, 5, 4), 12)
    assert (chosen.tolist(), row) == ([-1], Row([*prompt, 4, 5, 4, 4, 5, 4], Answer(len(prompt))))


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (public("a", " "), "the answer of 'p1' cannot be said: .* at least one word"),
        (public("é"), "the answer of 'p0' cannot be said"),
        ([Text("p", "a", 0, "b"), Text("p", "a", 0, "c")], "the same id"),
        ([Text(" \n", "a", 0, "b")], "printable"),
    ],
)
def test_texts_that_cannot_be_spoken_of(texts: list[Text], said: str) -> None:
    """No answer, one that the tokenizer makes nothing of, an id that comes twice, or one that cannot be printed."""
    with pytest.raises(DataError, match=said):
        exchange.sheet(LETTER_BY_LETTER, texts)


def test_what_is_said_is_named_by_its_text() -> None:
    """Likeliest tokens get the id and the size of their answer."""
    tops = [TopK(np.array([[A, B]]), np.log(np.array([[0.5, 0.25]], np.float32)))] * 2
    found = exchange.said(LETTER_BY_LETTER, public("a", " bc "), tops)

    assert [(x.id, x.size) for x in found] == [("p0", 1), ("p1", 1)]  # of `bc` one token was asked for
    assert found[1].ids is tops[1].ids


# What is learned ------------------------------------------------------------------------------------------------------
def test_pieces_are_learned_as_the_letters_they_begin_with() -> None:
    """Of `ab`, `c`, `ac` and `b` the letters a, c, b with .7, .2, .05 of .95; inside the piece nothing; then the end."""
    texts = public("ab")
    said = known("p0", 2, {4: 0.6, 2: 0.2, 5: 0.1, 1: 0.05}, {6: 0.9, 0: 0.05, 1: 0.03, 2: 0.02})
    own = known("p0", 2, *[{A: 0.1, B: 0.1, C: 0.1, END: 0.1}] * 3)
    (row,), chosen = exchange.lessons(LETTER_BY_LETTER, texts, [own], [(IN_PIECES, [said])], 0.75)
    (prompt,) = LETTER_BY_LETTER.encoder.prompts(["abc"])
    target = top(row)

    assert chosen.tolist() == [0]
    assert row.ids == [*prompt, A, B, END]
    assert (target.start, target.label_weight) == (len(prompt), 0.75)
    assert target.ids.shape == target.logprobs.shape == (3, 4)
    assert target.ids.dtype == np.int64
    assert target.logprobs.dtype == np.float32
    shares = {A: 0.7 / 0.95, C: 0.2 / 0.95, B: 0.05 / 0.95}
    assert dealt(target, 0) == [(token, shares[token]) for token in (B, C, A, B)]  # the least likely fills what is left
    assert dealt(target, 1) == [(0, 0.25)] * 4  # one token: nothing to learn
    assert dealt(target, 2) == [(C, 0.02), (B, 0.03), (A, 0.05), (END, 0.9)]


def test_where_the_learner_cuts_a_word_elsewhere_nothing_is_taught() -> None:
    """A teacher's `abc` begins like the learner's `ab`, but the learner says `a` and `bc`: `ab` would be wrong there."""
    texts = public("abc")
    who = voice(bpe(["Ġ", "a", "b", "c", "bc", "ab", "<end>"], ("b", "c"), ("a", "b")), 6)
    teacher = voice(bpe(["Ġ", "a", "b", "c", "ab", "abc", "<end>"], ("a", "b"), ("ab", "c")), 6)
    said = known("p0", 3, {5: 0.9, 1: 0.05}, {6: 0.9, 1: 0.05})
    (row,), chosen = exchange.lessons(who, texts, sure(who, texts, 0.01), [(teacher, [said])], 0.5)

    assert vocabulary_map(teacher.vocabulary, who.vocabulary).ids.tolist() == [0, 1, 2, 3, 5, 5, -1]
    assert (chosen.tolist(), row.ids[-3:]) == ([0], [1, 4, 6])
    assert [dealt(top(row), i) for i in (0, 1)] == [[(0, 0.5)] * 2] * 2
    assert dict(dealt(top(row), 2)) == {6: 0.9 / 0.95, 1: 0.05 / 0.95}


def test_a_liar_moves_an_answer_no_further_than_the_teachers_weight() -> None:
    """All but one token it says best; there the loss is least at .9 + .1 * .2 for the truth and .1 * .8 for the lie."""
    texts, who = public("abcab"), LETTER_BY_LETTER
    truth = exchange.sheet(who, texts).truths["p0"].tokens
    said = [{x: 0.2, A: 0.8} if i == 2 else {x: 0.99, (x + 1) % 5: 0.01} for i, x in enumerate(truth)]
    teachers = [(who, sure(who, texts, 0.7)), (who, [known("p0", 5, *said)])]
    (row,), chosen = exchange.lessons(who, texts, sure(who, texts, 0.6), teachers, 0.9)
    target = top(row)
    scores = torch.full((len(row.ids), 5), -1e4)
    at = target.start - 1 + 2
    scores[at, [C, A]] = torch.tensor([0.92, 0.08]).log()
    scores.requires_grad_()
    loss = losses.answer(scores, torch.eye(5), row.ids, target)[2]
    (slope,) = torch.autograd.grad(loss, scores)

    assert (chosen.tolist(), truth[2], target.label_weight) == ([1], C, 0.9)
    assert dict(dealt(target, 2)) == {C: 0.2, A: 0.8}
    np.testing.assert_allclose(slope[at], 0, atol=1e-6)


def test_letters_teach_pieces_only_where_they_say_as_much() -> None:
    """Where the learner says `ab` the teacher says `a`: only the end is shared, and without ends nothing is."""
    texts, ends = public("ab"), (None, 6)
    for end in ends:
        who, teacher = voice(PIECES, end), voice(LETTERS, None if end is None else END)
        said = sure(teacher, texts, 0.9)
        (row,), chosen = exchange.lessons(who, texts, sure(who, texts, 0.01), [(teacher, said)], 0.5)
        (prompt,) = who.encoder.prompts(["abc"])

        assert chosen.tolist() == [0]
        if end is None:
            assert row == Row([*prompt, 4], Answer(len(prompt)))
        else:
            assert dealt(top(row), 0) == [(0, 0.5)] * 2
            assert dict(dealt(top(row), 1)) == {6: 0.9 / 0.95, 3: 0.05 / 0.95}


def test_one_that_does_not_say_the_end_does_not_teach_it() -> None:
    """Whichever of the two has no end token; the words are taught."""
    texts = public("ca")
    for who, teacher in ((LETTER_BY_LETTER, voice(PIECES)), (voice(LETTERS), IN_PIECES)):
        (row,), _ = exchange.lessons(who, texts, sure(who, texts, 0.01), [(teacher, sure(teacher, texts, 0.9))], 0.5)
        learned = [len(set(ids)) > 1 for ids in top(row).ids.tolist()]

        assert learned == [True, True] + [False] * (who.end is not None)


def test_of_two_teachers_and_itself_the_best_teaches() -> None:
    """In nats a byte: letters say three tokens of two bytes, pieces two; equal to oneself is not better."""
    texts = public("ab", "ac", "ab", "ab")
    own = sure(LETTER_BY_LETTER, texts, 0.2, 0.2, 0.9, 0.5)
    letters, pieces = sure(voice(LETTERS, END), texts, 0.5, 0.7, 0.8, 0.5), sure(IN_PIECES, texts, 0.5, 0.5, 0.5, 0.3)
    teachers = [(voice(LETTERS, END), letters), (IN_PIECES, pieces)]
    costs = [[-math.log(p) * n / 2 for p in ps] for n, ps in ((3, (0.5, 0.7)), (2, (0.5, 0.5)))]
    assert costs[0][0] > costs[1][0]
    assert costs[0][1] < costs[1][1]
    rows, chosen = exchange.lessons(LETTER_BY_LETTER, texts, own, teachers, 0.9)

    assert chosen.tolist() == [1, 0, -1, -1]
    assert [type(row.target) for row in rows] == [TopTokens, TopTokens, Answer, Answer]


def test_who_says_nothing_of_a_text_teaches_nothing_of_it() -> None:
    """A teacher may know some of the texts; without any teacher all is learned by its answers."""
    texts = public("ab", "c")
    own, said = sure(LETTER_BY_LETTER, texts, 0.1, 0.1), sure(IN_PIECES, texts, 0.9, 0.9)
    _, some = exchange.lessons(LETTER_BY_LETTER, texts, own, [(IN_PIECES, said[1:])], 0.9)
    rows, none = exchange.lessons(LETTER_BY_LETTER, texts, own, [], 0.9)

    assert some.tolist() == [-1, 0]
    assert none.tolist() == [-1, -1]
    assert all(isinstance(row.target, Answer) for row in rows)


def test_one_tokenizer_needs_no_alignment() -> None:
    """Each position's targets are the teacher's tokens, renormalized; also of a cut answer, and inside a character."""
    task = msgspec.structs.replace(ASK, answer_tokens=4)
    who = voice(TOKENIZERS["bytes"], TOKENIZERS["bytes"].token_to_id("<end>"), task)
    texts = public("good", "🙂漢", "well-known (bad) films")
    truths = exchange.sheet(who, texts).truths
    rng = np.random.default_rng(0)
    said = []
    for text in texts:
        m = len(truths[text.id].tokens)
        others = np.stack([rng.permutation(len(who.vocabulary))[:5] for _ in range(m)])
        others[:, 0] = truths[text.id].tokens
        assert all(len(set(row)) == 5 for row in others.tolist())
        p = np.sort(rng.dirichlet(np.ones(6), m))[:, :0:-1]
        said.append(Knowledge(text.id, truths[text.id].size, others, np.log(p).astype(np.float32)))
    assert len(truths["p2"].tokens) == 4
    rows, chosen = exchange.lessons(who, texts, sure(who, texts, 1e-4, 1e-4, 1e-4), [(who, said)], 0.9)

    assert chosen.tolist() == [0, 0, 0]
    for row, heard in zip(rows, said, strict=True):
        assert (top(row).ids[:, ::-1] == heard.ids).all()
        p = np.exp(heard.logprobs)
        np.testing.assert_allclose(np.exp(top(row).logprobs[:, ::-1]), p / p.sum(1, keepdims=True), rtol=1e-5)


def test_one_tokenizer_may_end_answers_in_two_ways() -> None:
    """A base model and its chat model: the one's end is learned as the other's, in whatever company."""
    tokens = bpe(["Ġ", "a", "b", "c", "<end>", "<stop>"])
    tokens.add_special_tokens(["<stop>"])
    chat, other, texts = voice(tokens, 5), voice(tokens, END), public("ab", "c")
    said = [sure(who, texts, *shares) for who, shares in ((other, (0.8, 0.7)), (chat, (0.7, 0.8)))]
    assert said[0][0].ids[-1].tolist() == [END, 5]
    teachers = [(other, said[0]), (chat, said[1])]
    rows, chosen = exchange.lessons(chat, texts, sure(chat, texts, 0.1, 0.1), teachers, 0.9)

    assert chosen.tolist() == [0, 1]
    assert set(top(rows[0]).ids[-1].tolist()) == {5}  # both of the other's tokens mean that it ends
    assert dict(dealt(top(rows[1]), -1)) == {5: 0.8 / 0.9, 0: 0.1 / 0.9}


def test_patterns_that_end_differently_are_refused() -> None:
    """One model would say the space that the other has read already."""
    texts, teacher = public("ab"), voice(PIECES, 6, JOINED)
    with pytest.raises(DataError, match="the patterns of two models end differently"):
        exchange.lessons(LETTER_BY_LETTER, texts, sure(LETTER_BY_LETTER, texts, 0.1), [(teacher, sure(teacher, texts, 0.9))], 0.5)


@pytest.mark.parametrize("wrong", [lambda own: own[::-1], lambda own: own[:1], lambda own: [replace(own[0], id="p9"), own[1]]])
def test_what_it_says_itself_is_of_these_texts(wrong: Callable[[list[Knowledge]], list[Knowledge]]) -> None:
    """In another order, of fewer, or of another one."""
    texts = public("ab", "c")
    with pytest.raises(DataError, match="comes in their order"):
        exchange.lessons(LETTER_BY_LETTER, texts, wrong(sure(LETTER_BY_LETTER, texts, 0.1, 0.1)), [], 0.5)


# Any tokenizers -------------------------------------------------------------------------------------------------------
POOL = (("a", "b"), ("ab", "c"), ("Ġ", "a"), ("Ġ", "ab"), ("b", "c"), ("c", "a"), ("ab", "ab"), ("Ġa", "b"), ("bc", "a"))


@st.composite
def tokenizers(draw: st.DrawFn) -> Tokenizer:
    """Letters and some merges, ids in any order; or one that was trained."""
    if draw(st.booleans()):
        return TOKENIZERS[draw(st.sampled_from(sorted(TOKENIZERS)))]
    tokens, merges = ["Ġ", "a", "b", "c", "<end>"], list[tuple[str, str]]()
    for pair in draw(st.lists(st.sampled_from(POOL), unique=True)):
        if set(pair) <= set(tokens) and "".join(pair) not in tokens:
            merges.append(pair)
            tokens.append("".join(pair))
    return bpe(draw(st.permutations(tokens)), *merges)


@st.composite
def voices(draw: st.DrawFn, task: Task) -> Voice:
    tokenizer = draw(tokenizers())
    ends = [i for i in map(tokenizer.token_to_id, ("<end>", "[SEP]")) if i is not None]
    return voice(tokenizer, draw(st.sampled_from([None, *ends])), task)


def guesses(who: Voice, texts: Sequence[Text], rng: np.random.Generator, k: int) -> list[Knowledge]:
    """Some tokens at each position, the truth often among them, a few of no probability."""
    found, truths = [], exchange.sheet(who, texts).truths
    k = min(k, len(who.vocabulary))
    for text in texts:
        tokens = truths[text.id].tokens
        ids = np.stack([rng.permutation(len(who.vocabulary))[:k] for _ in tokens])
        for row, token in zip(ids, tokens, strict=True):
            if rng.random() < 0.8 and token not in row:
                row[rng.integers(k)] = token
        logprobs = np.log(rng.dirichlet(np.full(k + 1, 0.3), len(tokens))[:, :k] + 1e-12)
        logprobs[rng.random(logprobs.shape) < 0.1] = LOWEST
        found.append(Knowledge(text.id, truths[text.id].size, ids, logprobs.astype(np.float32)))
    return found


@strategies.fuzzing
@given(st.data(), st.integers(0, 10_000), st.integers(1, 5), st.sampled_from([2, 6]))
def test_whatever_the_tokenizers_nothing_is_taught_that_nobody_said(data: st.DataObject, seed: int, k: int, most: int) -> None:
    """One row a text, its tokens those of prompt and answer; targets are tokens of the learner that a teacher gave a chance."""
    task = msgspec.structs.replace(data.draw(st.sampled_from([ASK, JOINED])), answer_tokens=most)
    texts = public(*data.draw(st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=3)))
    who, others = data.draw(voices(task)), data.draw(st.lists(voices(task), max_size=2))
    rng = np.random.default_rng(seed)
    teachers = [(other, guesses(other, texts, rng, k)) for other in others]
    own = guesses(who, texts, rng, k)
    rows, chosen = exchange.lessons(who, texts, own, teachers, 0.3)
    prompts, truths = who.encoder.prompts([text.text for text in texts]), exchange.sheet(who, texts).truths

    assert [row.ids for row in rows] == [[*p, *truths[text.id].tokens] for p, text in zip(prompts, texts, strict=True)]
    for i, (row, teacher) in enumerate(zip(rows, chosen.tolist(), strict=True)):
        start, target = len(prompts[i]), row.target
        if isinstance(target, Answer):
            assert target == Answer(start)
            continue
        target = top(row)
        assert teacher >= 0
        assert (target.start, target.label_weight, len(target.ids)) == (start, 0.3, len(row.ids) - start)
        assert ((target.ids >= 0) & (target.ids < len(who.vocabulary))).all()
        assert np.isfinite(target.logprobs).all()
        other, said = others[teacher], teachers[teacher][1][i]
        ends = {} if other.end is None or who.end is None else {other.end: who.end}
        mapping = vocabulary_map(other.vocabulary, who.vocabulary, ends).ids
        given_some = set(mapping[said.ids[said.logprobs > LOWEST]].tolist())
        for ids, logprobs in zip(target.ids.tolist(), target.logprobs, strict=True):
            if len(set(ids)) == 1:
                np.testing.assert_allclose(logprobs, logprobs[0])
            else:
                assert set(ids) <= given_some
                np.testing.assert_allclose(sum(dict(zip(ids, np.exp(logprobs), strict=True)).values()), 1, rtol=1e-4)


@strategies.fuzzing
@given(st.data(), st.sampled_from([2, 6]))
def test_whoever_is_sure_of_an_answer_teaches_it(data: st.DataObject, most: int) -> None:
    """Whatever the two tokenizers: wherever something is learned, the answer's own token is learned most."""
    task = msgspec.structs.replace(data.draw(st.sampled_from([ASK, JOINED])), answer_tokens=most)
    texts = public(data.draw(st.text("abc", min_size=1, max_size=6)))
    who, other = data.draw(voices(task)), data.draw(voices(task))
    (row,), _ = exchange.lessons(who, texts, sure(who, texts, 1e-4), [(other, sure(other, texts, 0.9))], 0.5)

    if isinstance(row.target, TopTokens):
        for token, ids, logprobs in zip(row.ids[row.target.start :], row.target.ids, row.target.logprobs, strict=True):
            assert len(set(ids.tolist())) == 1 or ids[logprobs.argmax()] == token


# What comes over the wire ---------------------------------------------------------------------------------------------
TEXTS = public("ab", "cab")
BODIES = {
    "texts": wire.pack_lines(TEXTS),
    "knowledge": knowledge.pack(sure(IN_PIECES, TEXTS, 0.8, 0.6), exchange.sheet(IN_PIECES, TEXTS)),
    "tokenizer": PIECES.to_str().encode(),
}
NOWHERE = File("0" * 64, 0)
TOLD = Told(NOWHERE, NOWHERE, NOWHERE, ASK, 6)
CODES = {"bad-message", "too-large", "bad-tensors", "wrong-shape", "wrong-knowledge", "not-finite"}


def heard(told: Told, bodies: Mapping[str, bytes]) -> Heard:
    return exchange.hear(told, **{**BODIES, **bodies})


def test_three_blobs_are_what_the_llm_says() -> None:
    """Texts, how it spells them, and what it says, to 16 bits."""
    found = heard(TOLD, {})

    assert found.public == TEXTS
    assert (found.voice.vocabulary.digest, found.voice.end) == (IN_PIECES.vocabulary.digest, 6)
    for own, sent in zip(found.knowledge, sure(IN_PIECES, TEXTS, 0.8, 0.6), strict=True):
        assert (own.ids == sent.ids).all()
        np.testing.assert_allclose(own.logprobs, sent.logprobs, rtol=1e-3)


def tokenizer_with(**changes: Any) -> bytes:
    return json.dumps({**json.loads(PIECES.to_str()), **changes}).encode()


@pytest.mark.parametrize(
    ("told", "bodies", "code"),
    [
        (TOLD, {"texts": b""}, "bad-message"),
        (TOLD, {"texts": BODIES["texts"][:-9]}, "bad-message"),
        (TOLD, {"texts": BODIES["texts"] * 2}, "bad-message"),  # each id twice
        (TOLD, {"texts": wire.pack_lines(public("ab", ""))}, "bad-message"),
        (TOLD, {"texts": wire.pack_lines(public("ab", "a"))}, "wrong-shape"),
        (TOLD, {"knowledge": BODIES["knowledge"][:-4]}, "bad-tensors"),
        (TOLD, {"tokenizer": b""}, "bad-message"),
        (TOLD, {"tokenizer": b"\xff"}, "bad-message"),
        (msgspec.structs.replace(TOLD, end=END), {"tokenizer": LETTERS.to_str().encode()}, "wrong-knowledge"),
        (TOLD, {"tokenizer": tokenizer_with(model={"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []})}, "bad-message"),
        (
            TOLD,
            {"tokenizer": tokenizer_with(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})},
            "bad-message",  # tokenizers panics
        ),
        (msgspec.structs.replace(TOLD, end=7), {}, "bad-message"),
        (msgspec.structs.replace(TOLD, end=-1), {}, "bad-message"),
        (msgspec.structs.replace(TOLD, end=None), {}, "wrong-shape"),
        (msgspec.structs.replace(TOLD, task=Task(("a", "b"), "{text}", (("a",), ("b",)))), {}, "bad-message"),
    ],
)
def test_what_the_llm_cannot_have_said_is_refused(told: Told, bodies: dict[str, bytes], code: str) -> None:
    """Each blob wrong in one way, and each word about them."""
    with pytest.raises(WireError) as caught:
        heard(told, bodies)

    assert caught.value.code == code
    assert "\n" not in caught.value.detail


def check_refusal(error: WireError) -> None:
    assert error.code in CODES


@strategies.fuzzing
@given(st.sampled_from(sorted(BODIES)), st.data())
def test_hostile_bytes_are_one_error(which: str, data: st.DataObject) -> None:
    """Whatever is in a blob: what is heard can be learned from, or a WireError with a known code is raised."""
    body = data.draw(strategies.damaged(BODIES[which]) | st.binary(max_size=64))
    try:
        found = heard(TOLD, {which: body})
    except WireError as error:
        check_refusal(error)
    else:
        assert {known.id for known in found.knowledge} <= {text.id for text in found.public}
        own = sure(LETTER_BY_LETTER, found.public, *[0.01] * len(found.public))
        exchange.lessons(LETTER_BY_LETTER, found.public, own, [(found.voice, found.knowledge)], 0.5)
