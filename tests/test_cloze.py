"""The task of the last word: what it asks, what it offers, and that it mixes no parts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.tasks import Example
from examples import cloze
from examples.icwsm import Domain

SENTENCES = [
    Example(f"this is a rather long sentence about {word}.", 1) for word in ("films", "Phones", "weather", "trains", "bread")
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It was one of the better films.", ("It was one of the better", "films")),
        ("It was one of the better Films!?", ("It was one of the better", "films")),
        ("they all said it was, in the end, great", ("they all said it was, in the end,", "great")),
        ("It was one of the best of it", None),  # too short a word
        ("a very good film", None),  # too short a sentence
        ("it all came to no less than 1999", None),
        ("", None),
    ],
)
def test_the_last_word_is_asked_for(text: str, expected: tuple[str, str] | None) -> None:
    """A word of four letters or more after six words or more, in lower case and without what follows it."""
    found = cloze.example(text)

    assert (None if found is None else (found.text, found.answer)) == expected


def test_choices_are_other_last_words() -> None:
    """Four different words each, the true one first, all of these sentences; the seed alone decides."""
    found = cloze.choices(SENTENCES, np.random.default_rng(0))
    words = {"films", "phones", "weather", "trains", "bread"}

    assert [choice.words[0] for choice in found] == ["films", "phones", "weather", "trains", "bread"]
    assert all(len(set(choice.words)) == 4 and set(choice.words) < words for choice in found)
    assert found == cloze.choices(SENTENCES, np.random.default_rng(0))
    assert found != cloze.choices(SENTENCES, np.random.default_rng(1))


def test_too_few_words_are_refused() -> None:
    """Three sentences cannot offer four words."""
    with pytest.raises(ValueError, match="3 different"):
        cloze.choices(SENTENCES[:3], np.random.default_rng(0))


@given(st.text(max_size=80))
def test_a_prompt_and_its_answer_make_the_sentence(text: str) -> None:
    """Nothing is invented: the sentence begins with the prompt, and its last letters are the answer."""
    if (found := cloze.example(text)) is not None:
        assert text.startswith(found.text)
        assert "".join(c for c in text[len(found.text) :] if c.isascii() and c.isalpha()).lower() == found.answer


def test_parts_stay_apart() -> None:
    """What was for the test is for the test."""
    domain = Domain("a", tuple(SENTENCES[:2]), tuple(SENTENCES[2:3]), tuple(SENTENCES[3:]))
    made = cloze.domains({"a": domain})["a"]

    assert [[e.answer for e in part] for part in (made.train, made.validation, made.test)] == [
        ["films", "phones"],
        ["weather"],
        ["trains", "bread"],
    ]
