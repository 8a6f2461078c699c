"""CrossLM-style mutual learning of a server's LLM and devices' SLMs through synthetic text (after Deng et al. 2023, 2312.05842).

    server:  S_t <- texts of the LLM for each label                                        `prompts`, knowledge/filters.py
    device:  p_kj <- class probabilities of its own SLM, trained on its private data
    server:  p_j <- sum_k a_k p_kj, good if its label is likeliest and sure enough          `decide`, knowledge/judging.py
    server:  LLM <- learns to write what was judged good, not what was judged bad, and the task itself    `lessons`
    device:  SLM <- private labels + mu * judged texts with their soft labels

The paper's equations are not public: this is a reconstruction, and docs/systems/crosslm.md says of what.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec
import numpy as np

from edge_server.knowledge.judging import Verdict
from edge_server.llm.jobs import Good, Labelled, Lessons, Pair


class Draft(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text the LLM wrote after `prompt`, which asks for the class `label`."""

    prompt: str
    label: int
    text: str


class Judged(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A draft and what the judges make of it.

    Args:
        soft: combined class probabilities (n_classes,).
        quality: that of the class it was written for.
        good: this class is the likeliest, and sure enough to be an example of it. bad: another class is the likeliest.
    """

    draft: Draft
    soft: tuple[float, ...]
    quality: float
    good: bool
    bad: bool


def prompts(patterns: Sequence[str], names: Sequence[str]) -> list[tuple[str, int]]:
    """Every pattern for every label, `{label}` replaced by the label's name: (prompt, class index)."""
    return [(pattern.replace("{label}", name), label) for pattern in patterns for label, name in enumerate(names)]


def decide(drafts: Sequence[Draft], verdict: Verdict, quality: float) -> list[Judged]:
    """What becomes of each draft that somebody judged; the others are left out.

    Args:
        verdict: of these drafts, in their order.
        quality: how sure the judges must be of a good one, of (1 / n_classes, 1].
    """
    decided = []
    for draft, soft, answers in zip(drafts, verdict.soft, verdict.answers, strict=True):
        if answers:
            own, likeliest = float(soft[draft.label]), int(np.argmax(soft))
            good = likeliest == draft.label and own >= quality
            decided.append(Judged(draft, tuple(map(float, soft)), own, good, bad=likeliest != draft.label))
    return decided


def lessons(judged: Sequence[Judged], leash: Sequence[str]) -> Lessons:
    """What the LLM learns from: good texts by their quality, each bad text beside a good one of its prompt, and all soft labels.

    The best texts of a prompt meet its worst first; where a prompt has none of a kind, there is no contrast to learn.
    """
    good: defaultdict[str, list[Judged]] = defaultdict(list)
    bad: defaultdict[str, list[Judged]] = defaultdict(list)
    for sample in judged:
        if sample.good or sample.bad:
            (good if sample.good else bad)[sample.draft.prompt].append(sample)
    pairs = []
    for prompt, worse in bad.items():
        better = sorted(good[prompt], key=lambda sample: -sample.quality)
        worse.sort(key=lambda sample: sample.quality)
        pairs += [Pair(prompt, better[i % len(better)].draft.text, x.draft.text) for i, x in enumerate(worse) if better]
    return Lessons(
        good=tuple(Good(x.draft.prompt, x.draft.text, x.quality) for x in judged if x.good),
        pairs=tuple(pairs),
        labelled=tuple(Labelled(x.draft.text, x.soft) for x in judged),
        leash=tuple(leash),
    )


def acceptance(judged: Sequence[Judged]) -> float:
    """Share of fresh texts that were good."""
    return sum(x.good for x in judged) / len(judged) if judged else 0.0
