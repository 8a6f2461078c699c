"""What becomes of synthetic texts, by hand: which are good, what stands beside what, what the LLM is taught."""

from __future__ import annotations

import numpy as np

from edge_server.knowledge.judging import Verdict
from edge_server.llm.jobs import Good, Pair
from edge_server.systems.crosslm import Draft, Judged, acceptance, decide, lessons, prompts

DRAFTS = [Draft("p0", 0, "a"), Draft("p0", 0, "b"), Draft("p1", 1, "c"), Draft("p1", 1, "d"), Draft("p1", 1, "e")]
SOFT = np.array([[0.9, 0.1], [0.3, 0.7], [0.45, 0.55], [0.2, 0.8], [0.0, 0.0]])
VERDICT = Verdict(SOFT, (1.0, 1.0), np.array([2, 1, 2, 2, 0]))


def test_prompts_ask_for_every_label_in_every_pattern() -> None:
    """Patterns times names."""
    assert prompts(["a {label} film", "{label}!"], ["bad", "good"]) == [
        ("a bad film", 0),
        ("a good film", 1),
        ("bad!", 0),
        ("good!", 1),
    ]


def test_decisions_by_hand() -> None:
    """Sure of its label: good; another label: bad; its own but unsure: neither; judged by nobody: left out."""
    decided = decide(DRAFTS, VERDICT, 0.6)

    assert [(x.draft.text, x.quality, x.good, x.bad) for x in decided] == [
        ("a", 0.9, True, False),
        ("b", 0.3, False, True),
        ("c", 0.55, False, False),
        ("d", 0.8, True, False),
    ]
    assert decided[1].soft == (0.3, 0.7)
    assert acceptance(decided) == 0.5
    assert acceptance([]) == 0


def test_lessons_by_hand() -> None:
    """Good texts by quality, a contrast where a prompt has both, the task from all."""
    found = lessons(decide(DRAFTS, VERDICT, 0.6), ["base"])

    assert found.good == (Good("p0", "a", 0.9), Good("p1", "d", 0.8))
    assert found.pairs == (Pair("p0", "a", "b"),)
    assert [(x.text, x.probabilities) for x in found.labelled][:2] == [("a", (0.9, 0.1)), ("b", (0.3, 0.7))]
    assert len(found.labelled) == 4
    assert found.leash == ("base",)


def test_the_best_meets_the_worst() -> None:
    """Two good and three bad of one prompt: best beside worst, then around again."""

    def judged(text: str, quality: float) -> Judged:
        return Judged(Draft("p", 0, text), (quality, 1 - quality), quality, quality >= 0.6, quality < 0.5)

    some = [judged("g7", 0.7), judged("b4", 0.4), judged("g9", 0.9), judged("b1", 0.1), judged("b2", 0.2), judged("u", 0.55)]

    assert [(x.good, x.bad) for x in lessons(some, []).pairs] == [("g9", "b1"), ("g7", "b2"), ("g9", "b4")]
