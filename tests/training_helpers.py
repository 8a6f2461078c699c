"""A tiny bundle's engine and learner, and jobs for them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edge_sdk import bundle as bundles
from edge_sdk.adapters import AdapterSpec, Array
from edge_sdk.bundle import Bundle
from edge_sdk.engines import Engine, open_engine
from edge_sdk.tasks import Task
from edge_sdk.tokens import Ids
from edge_sdk.training.batches import Answer, Guess, Job, Label, Row, Source, Training
from edge_sdk.training.hidden import HiddenStates
from edge_sdk.training.learner import Learner
from tests import factories

TEXTS = [f"the {noun} was {word}" for noun in ("film", "phone", "day") for word in factories.GOOD + factories.BAD]
ANSWERS = Task((), "{text} it was", (), max_tokens=16, answer_tokens=4)


@dataclass
class Workbench:
    """What a test trains with; `read` lists the texts that went through the trunk."""

    folder: Path
    bundle: Bundle
    engine: Engine
    spec: AdapterSpec
    learner: Learner
    read: list[Ids]


def bench_of(
    folder: Path,
    cache: Path | None = None,
    layers: int = 1,
    *,
    rank: int = 2,
    alpha: float = 4.0,
    task: Task | None = None,
    freeze_a: bool = False,
    micro_tokens: int = 24,
    trunk: float = 1.0,
    pause: float = 0.0,
) -> Workbench:
    """A learner of the top `layers` layers of a tiny bundle, in exact arithmetic.

    Args:
        trunk: its hidden states are multiplied by this, and its key says so.
        pause: seconds that the trunk rests after each text.
    """
    bundle = bundles.read(folder)
    engine = open_engine(folder, bundle, task)
    split = bundle.layers - layers
    spec = AdapterSpec(tuple(s for s in bundle.slots if s.layer >= split), rank, alpha, freeze_a)
    read: list[Ids] = []

    def compute(sequences: Sequence[Ids]) -> list[Array]:
        read.extend(sequences)
        time.sleep(pause * len(sequences))
        return [states * np.float32(trunk) for states in engine.hidden(sequences, split)]

    states = HiddenStates(compute, f"tiny {trunk}", cache)
    head = None if task is not None and task.answer_tokens else engine.head
    learner = Learner.split(folder, bundle, head, engine.encoder, spec, states, layers, micro_tokens=micro_tokens)
    torch.set_float32_matmul_precision("highest")
    return Workbench(folder, bundle, engine, spec, learner, read)


def rows_of(bench: Workbench, texts: Sequence[str] = TEXTS) -> list[Row]:
    """Texts with the labels their words mean."""
    labels = [int(text.split()[-1] in factories.GOOD) for text in texts]
    return [Row(ids, Label(label)) for ids, label in zip(bench.engine.encoder.prompts(texts), labels, strict=True)]


def job_of(bench: Workbench, steps: int = 6, *, dropout: float = 0.1, rate: float = 0.01, bucket: int = 1, seed: int = 0) -> Job:
    """Private labels, and guesses at half their weight."""
    rows = rows_of(bench)
    guesses = [Row(row.ids, Guess(np.array([0.5, -0.5], np.float32), 0.5)) for row in rows[::3]]
    training = Training(steps=steps, batch_size=7, learning_rate=rate, dropout=dropout, bucket=bucket)
    return Job(bench.spec.start(1), [Source(rows, 7), Source(guesses, 4, 0.5)], training, seed)


def answers_of(bench: Workbench) -> list[Row]:
    """Each text is answered by its own last word."""
    prompts = bench.engine.encoder.prompts(["the film was", "it was very"])
    said = bench.engine.answers(["great", "sad"])
    return [Row([*prompt, *answer], Answer(len(prompt))) for prompt, answer in zip(prompts, said, strict=True)]
