"""What is trained on, and which examples meet in which step; pure, so a run can be replayed from its seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_sdk.adapters import Array, Arrays
from edge_sdk.errors import DataError, SettingsError
from edge_sdk.tokens import Ids


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a device trains between receiving a version and answering it.

    Args:
        steps: optimizer steps.
        batch_size: labelled examples in each step.
        learning_rate: of AdamW, constant.
        clip: largest norm of one step's gradient.
        dropout: share of activations dropped while training, in the base's own dropout layers and before LoRA. It is
            what a student that starts as its own teacher learns against (Xie et al. 2020, noisy student).
        bucket: sequences of similar length meet in a batch, out of groups of this many batches; 1 for no regard to length.
    """

    steps: int = 10
    batch_size: int = 16
    learning_rate: float = 1e-3
    clip: float = 1.0
    dropout: float = 0.1
    bucket: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 100_000 or not 1 <= self.batch_size <= 4096 or not 1 <= self.bucket <= 4096:
            raise SettingsError("training.steps must be 1 to 100000, training.batch_size and training.bucket 1 to 4096")
        if not 0 < self.learning_rate <= 1 or not 0 < self.clip < math.inf:
            raise SettingsError("training.learning_rate must be in (0, 1], training.clip positive and finite")
        if not 0 <= self.dropout < 1:
            raise SettingsError("training.dropout must be in [0, 1)")


# Targets: what a sequence should have answered ------------------------------------------------------------------------
@dataclass(frozen=True)
class Label:
    """The class somebody knows."""

    index: int


@dataclass(frozen=True)
class Guess:
    """A teacher's class scores (n_classes,), sharpened by `temperature` below 1; see `losses.soft`."""

    scores: NDArray[np.float32]
    temperature: float


@dataclass(frozen=True)
class Classes:
    """A teacher's class probabilities (n_classes,); see `losses.classes`."""

    probabilities: NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """The sequence's own tokens from position `start` on; see `losses.tokens`."""

    start: int


@dataclass(frozen=True)
class TopTokens:
    """A teacher's likeliest tokens at the positions from `start` on: ids (m, k), log-probabilities (m, k); `losses.top_k`.

    `label_weight` of the loss is that of the sequence's own tokens, as in `Answer`.
    """

    start: int
    ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    label_weight: float = 0.0


Target = Label | Guess | Classes | Answer | TopTokens


@dataclass(frozen=True)
class Row:
    """A sequence, complete with pattern, start and end, and what it should have answered."""

    ids: Ids
    target: Target


@dataclass(frozen=True)
class Source:
    """One kind of examples in a mixture: private, soft-labelled, public or synthetic.

    Args:
        rows: the examples.
        batch_size: how many of them are in each step.
        weight: of their mean loss in the step's loss.
    """

    rows: Sequence[Row]
    batch_size: int
    weight: float = 1.0


@dataclass(frozen=True)
class Job:
    """A whole training as a value: the same job gives the same adapter, however often it is interrupted.

    Args:
        start: the arrays to start from; not changed.
        sources: what is mixed; the loss of a step is the sum over sources of weight * mean loss of its batch.
        seed: orders the examples and drops activations.
    """

    start: Arrays
    sources: Sequence[Source]
    training: Training
    seed: int
    key: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not any(source.rows for source in self.sources):
            raise DataError("training needs at least one example; add some with `edge-agent add`")
        object.__setattr__(self, "key", _key(self))

    @property
    def rows(self) -> Iterator[Row]:
        """Every example there is, of all sources."""
        return (row for source in self.sources for row in source.rows)

    def steps(self) -> Iterator[list[tuple[Row, float]]]:
        """The rows of each step and their weights in its loss."""
        rng = np.random.default_rng(self.seed)
        rng.integers(2**31)  # the dropout's, drawn first
        steps, bucket = self.training.steps, self.training.bucket
        orders = [epochs([len(r.ids) for r in s.rows], s.batch_size, steps, rng, bucket) for s in self.sources]
        for batches in zip(*orders, strict=True):
            yield [
                (source.rows[i], source.weight / len(batch))
                for source, batch in zip(self.sources, batches, strict=True)
                for i in batch
            ]


@dataclass(frozen=True)
class Progress:
    """Not done yet: `reading` texts still go through the frozen trunk; `step` of `steps` optimizer steps are taken."""

    reading: int
    step: int
    steps: int


@dataclass(frozen=True)
class Done:
    """The trained arrays, and the mean loss over the steps."""

    arrays: dict[str, Array]
    loss: float


def epochs(
    lengths: Sequence[int], batch_size: int, steps: int, rng: np.random.Generator, bucket: int = 1
) -> Iterator[NDArray[np.int64]]:
    """`steps` batches of at most `batch_size` distinct indices; every index once before any comes twice.

    A batch at the end of a pass may be smaller; where there is nothing, every batch is empty.

    Args:
        lengths: of what the indices stand for.
        bucket: batches are drawn out of groups of `bucket` batches sorted by length, and come in no order.
    """
    queue: list[NDArray[np.int64]] = []
    for _ in range(steps):
        if not queue and len(lengths):
            queue = _one_pass(np.asarray(lengths), batch_size, rng, bucket)
        yield queue.pop(0) if queue else np.empty(0, np.int64)


def _one_pass(lengths: NDArray[np.int64], size: int, rng: np.random.Generator, bucket: int) -> list[NDArray[np.int64]]:
    order = rng.permutation(len(lengths))
    if bucket == 1:
        return [order[at : at + size] for at in range(0, len(order), size)]
    batches: list[NDArray[np.int64]] = []
    for at in range(0, len(order), size * bucket):
        group = order[at : at + size * bucket]
        group = group[np.argsort(lengths[group], kind="stable")]
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _key(job: Job) -> str:
    """Names a job by everything that its result depends on."""
    digest = hashlib.sha256(msgspec.json.encode((job.training, job.seed)))
    for name in sorted(job.start):
        digest.update(f"\n{name} {job.start[name].shape} ".encode())
        digest.update(job.start[name].tobytes())
    for source in job.sources:
        digest.update(f"\nsource {source.batch_size} {source.weight!r}".encode())
        for row in source.rows:
            digest.update(f"\n{row.ids} {type(row.target).__name__}".encode())
            for value in vars(row.target).values():
                digest.update(f" {np.shape(value)} ".encode() + np.asarray(value).tobytes())
    return digest.hexdigest()
