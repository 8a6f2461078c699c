"""Prompts as token ids: the pattern is never cut, padding is exact, batches lose nobody."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from edge_sdk.errors import DataError
from edge_sdk.tasks import Task
from edge_sdk.tokens import PromptEncoder, by_length, pad
from tests import strategies  # noqa: F401  # its hypothesis profile

WORDS = ["[UNK]", "[CLS]", "[SEP]", "it", "was", "good", "bad", "film", "a", "{", "}", "text", "say", ":"]
ID = {word: i for i, word in enumerate(WORDS)}
sequences = st.lists(st.lists(st.integers(1, 1000), max_size=12), min_size=1, max_size=20)


def task(pattern: str, max_tokens: int = 64) -> Task:
    return Task(("no", "yes"), pattern, (("bad",), ("good",)), max_tokens=max_tokens)


def ids(words: str) -> list[int]:
    return [ID[word] for word in words.split()]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words as tokens, with everything switched on that must not leak into prompts: template, truncation, padding."""
    made = Tokenizer(models.WordLevel(ID, unk_token="[UNK]"))  # noqa: S106  # a token, no password
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    made.enable_truncation(2)
    made.enable_padding(length=32)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def encoder(tokenizer: Path, pattern: str = "say : {text} it was", max_tokens: int = 64) -> PromptEncoder:
    return PromptEncoder(tokenizer, [ID["[CLS]"]], [ID["[SEP]"]], 64, task(pattern, max_tokens))


def test_a_prompt_is_the_text_inside_the_pattern(tokenizer: Path) -> None:
    """Prefix, pattern, text, pattern, suffix; the tokenizer's own template, truncation and padding stay out."""
    found = encoder(tokenizer).prompts(["a good film", " a "])

    assert found == [ids("[CLS] say : a good film it was [SEP]"), ids("[CLS] say : a it was [SEP]")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("{text}", "[CLS] film [SEP]"), ("{text} it was", "[CLS] film it was [SEP]"), ("say : {text}", "[CLS] say : film [SEP]")],
)
def test_a_pattern_may_have_one_side_or_none(tokenizer: Path, pattern: str, expected: str) -> None:
    """Nothing stands where the pattern has nothing."""
    assert encoder(tokenizer, pattern).prompts(["film"]) == [ids(expected)]


def test_a_long_text_is_cut_and_the_pattern_is_not(tokenizer: Path) -> None:
    """A text of a hundred tokens keeps its first `max_tokens`, and the words that ask the question stay behind it."""
    (found,) = encoder(tokenizer, max_tokens=5).prompts(["film " * 100])

    assert found == ids("[CLS] say : film film film film film it was [SEP]")


def test_a_text_cannot_play_pattern(tokenizer: Path) -> None:
    """A text that contains the placeholder is a text like any other."""
    assert encoder(tokenizer).prompts(["{text}"]) == [ids("[CLS] say : { text } it was [SEP]")]


# Control tokens -------------------------------------------------------------------------------------------------------
CONTROLS = ["<s>", "<|im_end|>", "[MASK]"]  # ids 0, 1 and 2
TALK = "{text} [MASK] so"


def byte_level() -> Tokenizer:
    """Byte-level BPE, as SmolLM2 has it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=CONTROLS, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["a film so good", "it was so bad"] * 9, trainer)
    return made


def unigram() -> Tokenizer:
    """As XLM-R has it: the control tokens, and what stands for unknown characters, are pieces like any others."""
    pieces = [*CONTROLS, "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz<>|[]_/ASMK"]
    made = Tokenizer(models.Unigram([(piece, 0.0 if at < 4 else -2.0) for at, piece in enumerate(pieces)], unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.add_special_tokens([*CONTROLS, "<unk>"])
    return made


def talking(made: Tokenizer) -> PromptEncoder:
    return PromptEncoder(made.to_str(), [], [], 600, Task((), TALK, (), max_tokens=512, answer_tokens=64))


TALKERS = {made.__name__: (made(), talking(made())) for made in (byte_level, unigram)}
texts = st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(CONTROLS)), max_size=6).map("".join)


@pytest.mark.parametrize("kind", TALKERS)
@given(text=texts)
def test_no_text_becomes_a_control_token(kind: str, text: str) -> None:
    """Whatever it spells, a text holds none; the pattern, which is the operator's, keeps its one."""
    _, made = TALKERS[kind]
    word = f"a{text}"

    assert [token for token in made.prompts([text])[0] if token < 3] == [2]
    assert not {0, 1, 2} & {token for row in (*made.plain([word]), *made.answers([word], None)) for token in row}
    assert not {0, 1, 2} & set(made.description(text))


@pytest.mark.parametrize("kind", TALKERS)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_other_texts_have_the_tokens_they_always_had(kind: str, text: str) -> None:
    """Only what spells a control token is read otherwise, characters the tokenizer does not know among them."""
    bare, made = TALKERS[kind]
    assume(not any(control in text for control in (*CONTROLS, "<unk>")))
    ids = bare.encode(text, add_special_tokens=False).ids
    assume(ids)

    assert made.plain([text]) == [ids[:600]]


def test_what_is_unknown_is_no_control_token() -> None:
    """It is a special token too, and stays where it was."""
    bare, made = TALKERS["unigram"]

    assert made.plain(["a\u0444b"]) == [bare.encode("a\u0444b", add_special_tokens=False).ids]
    assert 3 in made.plain(["a\u0444b"])[0]


def test_a_text_keeps_the_characters_of_a_control_token() -> None:
    """It can be read back as it was."""
    made = TALKERS["byte_level"][1]

    assert made.decode(made.plain(["so <|im_end|> good"])[0]) == "so <|im_end|> good"


def test_no_text_is_no_prompt(tokenizer: Path) -> None:
    """Nothing asked, nothing answered."""
    assert encoder(tokenizer).prompts([]) == []


def test_a_description_has_no_pattern(tokenizer: Path) -> None:
    """A class description stands between the encoder's own start and end, uncut."""
    assert encoder(tokenizer, max_tokens=4).description("it was " * 4) == ids("[CLS] " + "it was " * 4 + "[SEP]")


def with_words(tokenizer: Path, *words: str) -> PromptEncoder:
    made = Task(("a", "b"), "{text}", tuple((word,) for word in words))
    return PromptEncoder(tokenizer, [], [], 64, made)


def test_label_words_have_as_many_tokens_as_they_need(tokenizer: Path) -> None:
    """A label word may be one token or several; they come in the order of the classes."""
    assert with_words(tokenizer, "good", "bad film").words() == [[ID["good"]], [ID["bad"], ID["film"]]]


@pytest.mark.parametrize("words", [("good", "splendid"), ("good", ""), ("good splendid", "bad")])
def test_a_label_word_the_vocabulary_lacks_is_named(tokenizer: Path, words: tuple[str, str]) -> None:
    """A word without tokens, or with the token for unknown words, is refused by name."""
    with pytest.raises(DataError, match="is not in this model's vocabulary"):
        with_words(tokenizer, *words).words()


def test_label_words_must_differ(tokenizer: Path) -> None:
    """Two classes with the same tokens could never be told apart."""
    with pytest.raises(DataError, match="same tokens"):
        with_words(tokenizer, "good", " good").words()


def test_plain_text_is_cut_and_never_empty(tokenizer: Path) -> None:
    """Without the pattern a text keeps the model's own start and end, and an empty one is refused."""
    made = PromptEncoder(tokenizer, [1], [2], 10, task("the {text}", 64))
    assert [len(row) for row in made.plain(["good " * 100, "good"])] == [10, 3]
    bare = PromptEncoder(tokenizer, [], [], 10, task("the {text}", 64))
    with pytest.raises(DataError, match="empty text"):
        bare.plain(["good", ""])


def test_what_all_prompts_share_is_what_stands_before_the_text(tokenizer: Path) -> None:
    """Every prompt begins with the shared tokens, whatever its text."""
    made = encoder(tokenizer)
    assert made.shared
    assert all(row[: len(made.shared)] == made.shared for row in made.prompts(["good", "a film", ""]))


def test_padding_of_known_sequences() -> None:
    """Short sequences are filled with 0 on the right, and the mask says where."""
    input_ids, mask = pad([[7, 8, 9], [5], []])

    assert input_ids.tolist() == [[7, 8, 9], [5, 0, 0], [0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert input_ids.dtype == mask.dtype == np.int64


@given(sequences)
def test_padding_can_be_taken_off(rows: list[list[int]]) -> None:
    """What the mask covers is the sequence, what it does not is 0, and no row is longer than the longest."""
    input_ids, mask = pad(rows)

    assert [row[: int(kept.sum())].tolist() for row, kept in zip(input_ids, mask, strict=True)] == rows
    assert (input_ids[mask == 0] == 0).all()
    assert input_ids.shape == mask.shape == (len(rows), max(len(row) for row in rows))


@given(sequences, st.integers(1, 8))
def test_batches_by_length_lose_nobody(rows: list[list[int]], batch_size: int) -> None:
    """Every index comes exactly once, in full batches but for the last, from the shortest sequence to the longest."""
    batches = list(by_length(rows, batch_size))
    order = [i for batch in batches for i in batch]
    lengths = [len(rows[i]) for i in order]

    assert sorted(order) == list(range(len(rows)))
    assert lengths == sorted(lengths)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


def test_no_sequences_are_no_batches() -> None:
    """Nothing to batch gives no batch, not an empty one."""
    assert list(by_length([], 4)) == []


def test_a_prompt_never_outgrows_the_model(tokenizer: Path) -> None:
    """Text is cut to what the model can read with the pattern around it; a pattern that leaves no room is refused."""
    long = "good " * 100
    encoder = PromptEncoder(tokenizer, [1], [2], 10, task("the {text}", 64))

    assert len(encoder.prompts([long])[0]) == 10
    with pytest.raises(DataError, match="leaves no room"):
        PromptEncoder(tokenizer, [1], [2], 3, task("the {text}", 64))


# Answers --------------------------------------------------------------------------------------------------------------
def speaker(tokenizer: Path, pattern: str = "say : {text}", most: int = 4, positions: int = 64) -> PromptEncoder:
    return PromptEncoder(tokenizer, [ID["[CLS]"]], [], positions, Task((), pattern, (), answer_tokens=most))


def test_an_answer_is_its_words_and_the_end(tokenizer: Path) -> None:
    """Neither prefix nor pattern: the words, whatever space is around them, and the end token where the model has one."""
    made = speaker(tokenizer)

    assert made.answers(["good film", "  a\n"], 2) == [ids("good film [SEP]"), ids("a [SEP]")]
    assert made.answers(["good film"], None) == [ids("good film")]
    assert made.answers([], 2) == []


@pytest.mark.parametrize(
    ("words", "end", "expected"), [(2, 2, "a a [SEP]"), (3, 2, "a a a"), (9, 2, "a a a"), (3, None, "a a a"), (9, None, "a a a")]
)
def test_an_answer_that_is_cut_has_no_end(tokenizer: Path, words: int, end: int | None, expected: str) -> None:
    """An answer has at most `answer_tokens` tokens, the end token among them: nobody learns to stop where it was cut."""
    assert speaker(tokenizer, most=3).answers(["a " * words], end) == [ids(expected)]


@pytest.mark.parametrize("answer", ["", "  ", "\n\t"])
def test_an_empty_answer_is_refused(tokenizer: Path, answer: str) -> None:
    """An answer of nothing but space would teach to say nothing; it is an error, not an end token."""
    with pytest.raises(DataError, match="at least one word"):
        speaker(tokenizer).answers(["good", answer], 2)


def test_a_space_stands_between_pattern_and_answer_once(tmp_path: Path) -> None:
    """The answer brings its space along, as a word in a sentence has it, unless the pattern has ended in one."""
    made = Tokenizer(models.BPE({"a": 0, "b": 1, " ": 2}, [], unk_token=None))
    made.save(str(tmp_path / "tokenizer.json"))
    found = {
        pattern: PromptEncoder(tmp_path / "tokenizer.json", [], [], 64, Task((), pattern, (), answer_tokens=4)).answers(
            ["b"], None
        )
        for pattern in ("{text}", "{text}a", "{text} ")
    }

    assert found == {"{text}": [[2, 1]], "{text}a": [[2, 1]], "{text} ": [[1]]}


def test_prompt_and_answer_fit_the_model_together(tokenizer: Path) -> None:
    """The longest prompt leaves room for the longest answer; where there is none for any text, the task is refused."""
    made = speaker(tokenizer, most=4, positions=10)
    (prompt,), (answer,) = made.prompts(["good " * 50]), made.answers(["bad " * 50], 2)

    assert (len(prompt), len(answer)) == (6, 4)
    with pytest.raises(DataError, match="leaves no room"):
        speaker(tokenizer, most=7, positions=10)


def test_a_task_of_labels_has_no_text_answers(tokenizer: Path) -> None:
    """Asked for the tokens of an answer, a classification task says that its answers are labels; one text is no list."""
    with pytest.raises(DataError, match="are its labels"):
        encoder(tokenizer).answers(["good"], 2)
    with pytest.raises(DataError, match="list of strings"):
        speaker(tokenizer).answers("good", 2)
