"""Real sentiment in four domains (Hutto & Gilbert 2014, ICWSM-14, MIT): the text that the demo and the benches run on.

Rules: a sentence counts where its mean human rating has an absolute value of at least 1, its label is the sign; a hash of
domain and sentence id puts 20 % of each domain into test, and of the rest 20 % into validation. Whatever text stands in the
test part of any domain, word for word but for case and punctuation, is dropped from all training and validation; whatever
stands in validation, from training. Settings are chosen on validation, results are counted on test.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.assets import Asset
from edge_sdk.tasks import Example

SOURCE = "pypi:vaderSentiment==3.3.2#additional_resources/hutto_ICWSM_2014.tar.gz"
ASSET = Asset(SOURCE, "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", "MIT", source=True)
DOMAINS = {
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "tweets": "tweets",
    "nyt": "nytEditorialSnippets",
}
LABELS = ("negative", "positive")


@dataclass(frozen=True)
class Domain:
    """One domain's sentences, every one labelled; hide the label with `unlabelled`."""

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


def bucket(domain: str, sentence: str) -> int:
    """A number from 0 to 99 fixed by the sentence's id."""
    return int.from_bytes(hashlib.sha256(f"{domain}/{sentence}".encode()).digest()[:8], "big") % 100


def words(text: str) -> str:
    """What makes two sentences the same: their letters and digits, in lower case."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def parse(name: str, lines: Iterable[str]) -> Domain:
    """Splits `id TAB mean rating TAB text` lines of one domain."""
    parts: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for line in lines:
        sentence, rating, text = line.rstrip("\r\n").split("\t", 2)
        if abs(float(rating)) >= 1 and text.strip():
            b = bucket(name, sentence)
            part = "test" if b < 20 else "validation" if b < 36 else "train"
            parts[part].append(Example(text.strip(), int(float(rating) > 0)))
    return Domain(name, tuple(parts["train"]), tuple(parts["validation"]), tuple(parts["test"]))


def without_repeats(domains: Sequence[Domain]) -> dict[str, Domain]:
    """Drops from training and validation what any domain tests on, and from training what any validates on."""
    test = {words(e.text) for domain in domains for e in domain.test}
    validation = {words(e.text) for domain in domains for e in domain.validation}
    seen = test | validation
    return {
        domain.name: Domain(
            domain.name,
            tuple(e for e in domain.train if words(e.text) not in seen),
            tuple(e for e in domain.validation if words(e.text) not in test),
            domain.test,
        )
        for domain in domains
    }


def load(archive: Path) -> dict[str, Domain]:
    """Reads all four domains from the downloaded `hutto_ICWSM_2014.tar.gz`."""
    domains = []
    with tarfile.open(archive) as tar:
        for name, stem in DOMAINS.items():
            member = tar.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            assert member is not None, f"{stem} is a regular file of the archive"
            domains.append(parse(name, member.read().decode("latin-1").strip("\n").split("\n")))
    return without_repeats(domains)
