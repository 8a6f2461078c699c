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
    r"(\w+ )?(\w+ )?(sentence|example|review|tweet|comment)|system prompt|(this|the) (sentence|prompt)|instructions?:|"
    r"(ignore|disregard) ((all|any|every|each|of|the|your|my|these|those) )*(previous|prior|above|earlier|preceding|foregoing)|"
    r"(ignore|disregard|forget|override|bypass) (\w+ ){0,4}(instructions?|rules?|prompts?|guidelines?|orders)\b)|"
    r"^\W*(system|user|assistant|human|ai)\s*:",
    re.IGNORECASE,
)
_MARKUP = re.compile(  # what a tokenizer may take for a token of its own, and tags
    r"<\|[^<>]{0,60}\|>|</?[A-Za-z][\w-]{0,30}\s*/?>|<<|>>|\[/?[A-Z][A-Z_]{1,20}\d*\]|"
    r"(?i:\[/?(sep|cls|mask|pad|unk|bos|eos|inst|sys|unused\d+)\])"
)
# Scripts that part no words: Thai and Lao, Burmese, Khmer, kana, Han
_BLANKLESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[^\W{_BLANKLESS}]+|[{_BLANKLESS}]")


class Filter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Args:
    min_words, max_words: of a text; where a script has no blanks each character is one. max_chars: of a text, whatever its words.
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
    """One line without control and format characters; runs of blanks become one. What has no width parts nothing."""
    kinds = ((c, unicodedata.category(c)) for c in text)
    kept = "".join(" " if kind[0] in "CZ" else c for c, kind in kinds if kind != "Cf")
    return " ".join(kept.split())


def reason(text: str, prompt: str, labels: Sequence[str], rules: Filter) -> str:
    """Why a text is no good by itself: `short`, `long`, `markup`, `meta`, `echo`, `leak`; "" where it is good.

    `markup`: it spells tags or control tokens. `meta`: it talks about itself, or gives orders. `leak`: it says what a label is
    called, which no text of a user does. `echo`: it repeats five words of its prompt in a row. Other forms of the same letters
    (Unicode's NFKC) count as these.

    Args:
        labels: what labels are called, of one word or several.
    """
    words = _words(text)
    if len(words) < rules.min_words:
        return "short"
    if len(words) > rules.max_words or len(text) > rules.max_chars:
        return "long"
    same = unicodedata.normalize("NFKC", text)
    if _MARKUP.search(same):
        return "markup"
    if _META.search(same):
        return "meta"
    if _runs(words, 5) & _runs(_words(prompt), 5):
        return "echo"
    if any(tuple(name) in _runs(words, len(name)) for name in map(_words, labels) if name):
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


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _normal(text: str) -> str:
    return " ".join(_words(text))


def _runs(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
