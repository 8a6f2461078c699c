"""The last word: a generation task with real text, scored as multiple choice, made from the sentences of `icwsm.py`.

A model reads a sentence up to its last word of four letters or more, and says that word. Measured is which of four words it
finds likeliest: the true one and the last words of three other sentences of the domain. Why this task: answers are short, so
that small devices can train on them; a sentence mostly tells what its last word must be, so that a language model knows something
of it before any training (docs/LOG.md); and it needs no text but what is there already, split as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edge_sdk.tasks import Example, Task
from examples.icwsm import Domain

TASK = Task(labels=(), pattern="{text}", verbalizer=(), max_tokens=48, answer_tokens=6)
LAST = re.compile(r"^(.*\S)\s+([A-Za-z]{4,})\W*$")
WORDS = 6  # a sentence has at least this many before its last
CHOICES = 4


class Choice(NamedTuple):
    """A sentence without its last word, that word as its answer, and the words to choose among, the true one first."""

    example: Example
    words: tuple[str, ...]


def example(text: str) -> Example | None:
    """A sentence as prompt and answer; None where it is too short or ends in something else than a word."""
    found = LAST.match(text)
    if found is None or len(found[1].split()) < WORDS:
        return None
    return Example(found[1], answer=found[2].lower())


def examples(sentences: Sequence[Example]) -> list[Example]:
    """Of all sentences that can be asked about, in their order."""
    return [made for sentence in sentences if (made := example(sentence.text))]


def choices(sentences: Sequence[Example], rng: np.random.Generator) -> list[Choice]:
    """Each with three other last words of these sentences; all four differ."""
    rows = examples(sentences)
    words = [str(row.answer) for row in rows]
    if len(set(words)) < CHOICES:
        raise ValueError(f"{len(set(words))} different last words are too few to choose among")
    found = []
    for row in rows:
        chosen = [str(row.answer)]
        while len(chosen) < CHOICES:
            word = words[int(rng.integers(len(words)))]
            chosen += [word] if word not in chosen else []
        found.append(Choice(row, tuple(chosen)))
    return found


def domains(all_domains: dict[str, Domain]) -> dict[str, Domain]:
    """The same domains with prompts and answers in the place of sentences and labels; parts stay apart as they were."""
    return {
        name: Domain(name, tuple(examples(d.train)), tuple(examples(d.validation)), tuple(examples(d.test)))
        for name, d in all_domains.items()
    }
