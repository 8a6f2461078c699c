"""Which of the texts an LLM wrote are worth a device's time; the first reason that applies is recorded."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import SettingsError

Embed = Callable[[Sequence[str]], NDArray[np.float32]]

_META = re.compile(
    r"\b(as an ai|language model|i('m| am) (sorry|unable)|i can(no|')t (help|assist|write)|here('s| is| are) (a|an|the|some|my) "
    r"(\w+ )?(\w+ )?(sentence|example|review|tweet|comment)|ignore (all |the )?(previous|prior|above)|system prompt|"
    r"(this|the) (sentence|prompt)|instructions?:)",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+")


class Filter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Args:
    min_words, max_words: of a text. max_chars: of a text, whatever its words.
    similar: largest cosine (embedder) to a text that was kept before, in this version or an earlier one.
    """

    min_words: int = 4
    max_words: int = 60
    max_chars: int = 600
    similar: float = 0.9

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.max_words <= self.max_chars <= 10_000 or not 0 < self.similar <= 1:
            raise SettingsError("filter needs 1 <= min_words <= max_words <= max_chars <= 10000, and similar in (0, 1]")


def clean(text: str) -> str:
    """One line without control and format characters; runs of blanks become one."""
    kept = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text)
    return " ".join(kept.split())


def reason(text: str, prompt: str, labels: Sequence[str], rules: Filter) -> str:
    """Why a text is no good by itself: `short`, `long`, `meta`, `echo`, `leak`; "" where it is good.

    `leak`: it says the label's name, which no text of a user does. `echo`: it repeats five words of its prompt in a row.
    """
    words = [w.lower() for w in _WORD.findall(text)]
    if len(words) < rules.min_words:
        return "short"
    if len(words) > rules.max_words or len(text) > rules.max_chars:
        return "long"
    if _META.search(text):
        return "meta"
    if _runs(words, 5) & _runs([w.lower() for w in _WORD.findall(prompt)], 5):
        return "echo"
    if {label.lower() for label in labels} & set(words):
        return "leak"
    return ""


def keep(
    written: Iterable[tuple[str, str]], labels: Sequence[str], rules: Filter, embed: Embed | None, known: Sequence[str] = ()
) -> tuple[list[int], Counter[str]]:
    """Indices of the (prompt, text) pairs worth keeping, and how many were dropped for which reason.

    Args:
        embed: texts -> unit vectors (n, width); None compares words alone.
        known: texts kept in earlier versions, which new ones must not resemble.
    """
    pairs, why = list(written), Counter[str]()
    seen = {_normal(text) for text in known}
    kept: list[int] = []
    for i, (prompt, text) in enumerate(pairs):
        found = reason(text, prompt, labels, rules) or ("duplicate" if _normal(text) in seen else "")
        if found:
            why[found] += 1
        else:
            seen.add(_normal(text))
            kept.append(i)
    if embed is None or not kept:
        return kept, why
    vectors = embed([*known, *(pairs[i][1] for i in kept)])
    taken = list(range(len(known)))
    for at in range(len(known), len(vectors)):
        if taken and float((vectors[taken] @ vectors[at]).max()) > rules.similar:
            why["similar"] += 1
        else:
            taken.append(at)
    return [kept[at - len(known)] for at in taken[len(known) :]], why


def _normal(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


def _runs(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
