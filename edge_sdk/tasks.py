"""A language task: a text in a pattern, answered by one of some labels, or by a text.

Pattern-verbalizer prompting after Schick & Schütze 2021 (PET), section 3: a decoder scores the label words that would
follow the pattern, an encoder compares the text with descriptions of the classes. Both come down to one head: class
scores are `scale * readout @ rows.T`, so a task can be answered before any training. A task whose answers are texts has
neither labels nor verbalizer. No model here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import SettingsError

Kind = Literal["decoder", "encoder"]


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text classification task for one kind of model, or a generation task (prompt -> answer) for a decoder.

    Args:
        labels: class names, at least two; none where answers are texts.
        pattern: the prompt; holds `{text}` exactly once.
        verbalizer: for each label the words that stand for it. Decoder: one word, with its leading space, of one token or
            more. Encoder: one or more descriptions, whose mean embedding is the class.
        scale: factor on the scores: 1 for a decoder's logits, the inverse temperature of the cosine for an encoder.
        max_tokens: a prompt keeps at most this many tokens of its text.
        answer_tokens: an answer has at most this many tokens; 0 for a classification task.

    Raises:
        SettingsError: an argument is out of bounds.
    """

    labels: tuple[str, ...]
    pattern: str
    verbalizer: tuple[tuple[str, ...], ...]
    scale: float = 1.0
    max_tokens: int = 64
    answer_tokens: int = 0

    def __post_init__(self) -> None:
        if self.answer_tokens and (self.labels or self.verbalizer):
            raise SettingsError("a task with task.answer_tokens has no labels and no verbalizer: its answers are texts")
        if not self.answer_tokens and (len(self.labels) < 2 or len(set(self.labels)) != len(self.labels)):
            raise SettingsError("task.labels needs at least two different names")
        if self.pattern.count("{text}") != 1:
            raise SettingsError("task.pattern must contain {text} exactly once")
        if not 0 <= self.answer_tokens <= 512:
            raise SettingsError("task.answer_tokens must be between 0 and 512")
        if len(self.verbalizer) != len(self.labels) or not all(self.verbalizer):
            raise SettingsError("task.verbalizer needs one non-empty list of words per label")
        if not 0 < self.scale < math.inf or not 4 <= self.max_tokens <= 512:
            raise SettingsError("task.scale must be positive and finite, and task.max_tokens between 4 and 512")


@dataclass(frozen=True)
class Head:
    """Class rows (n_classes, width) and the scale that turn a readout (n, width) into class scores (n, n_classes)."""

    rows: NDArray[np.float32]
    scale: float

    def scores(self, readout: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(self.scale * (readout @ self.rows.T), dtype=np.float32)


@dataclass(frozen=True)
class Example:
    """A private text; `label` is a class index, `answer` a text; None where nobody has said it."""

    text: str
    label: int | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Private:
    """A device's text, by what it may be used for; labels are the task's class indices.

    Args:
        labelled: texts with labels or answers, for training.
        unlabelled: texts without.
        truths: for each unlabelled text the class somebody knows, or None; only ever used to measure soft labels.
        held_out: texts with labels or answers that are never trained on.
    """

    labelled: tuple[Example, ...]
    unlabelled: tuple[str, ...]
    truths: tuple[int | None, ...]
    held_out: tuple[Example, ...]


def sharpen(probabilities: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """p^(1/T), normalized: below 1 the likely becomes likelier (Berthelot et al. 2019, MixMatch, equation 7).

    A row of zeros, which says nothing, becomes uniform.
    """
    likeliest = probabilities.max(axis=-1, keepdims=True).astype(np.float64)
    powered = np.where(likeliest > 0, probabilities / np.where(likeliest > 0, likeliest, 1), 1) ** (1 / temperature)
    return np.asarray(powered / powered.sum(axis=-1, keepdims=True), np.float32)


def softmax(scores: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float32]:
    """Softmax of scores (..., n_classes) divided by `temperature`."""
    z = scores.astype(np.float64) / temperature
    z -= z.max(axis=-1, keepdims=True)
    e = np.exp(z)
    return np.asarray(e / e.sum(axis=-1, keepdims=True), np.float32)


def log_softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Row-wise logarithm of the softmax of (n, n_columns) scores, in nats."""
    z = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(axis=1, keepdims=True)), np.float32)


def accuracy(scores: NDArray[np.float32], labels: Sequence[int]) -> float:
    """Share of rows whose highest score is the label's, between 0 and 1."""
    return float(np.mean(scores.argmax(axis=1) == np.asarray(labels)))
