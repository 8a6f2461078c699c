"""A process that trains the tiny bundle in steps of one micro-batch; tests/test_trainer.py kills it.

python -m tests.killed_trainer BUNDLE HOME OUT: waits for a line, trains, prints each position that is reached and kept, and
writes the adapter to OUT. The trunk is slow, so that reading takes as long as a good part of the training.
"""

from __future__ import annotations

import sys
from pathlib import Path

import peft  # noqa: F401  # what takes long to import is there before the line comes

from edge_sdk import files, wire
from edge_sdk.training.batches import Done, Job, Label, Row, Source, Training
from edge_sdk.training.trainer import Trainer
from tests import factories
from tests.training_helpers import Workbench, bench_of

STEPS = 24
WORDS = factories.GOOD + factories.BAD
TEXTS = [f"{start} {a} and {b}" for start in ("it was so", "the film was", "a very") for a in WORDS for b in WORDS]
PAUSE = 0.002  # seconds a text


def job_of(bench: Workbench) -> Job:
    """432 texts, so 27 chunks to read; only some come up in the few steps."""
    rows = [Row(ids, Label(i % 2)) for i, ids in enumerate(bench.engine.encoder.prompts(TEXTS))]
    return Job(bench.spec.start(1), [Source(rows, 10)], Training(STEPS, 10, 0.01), 0)


def main() -> None:
    bundle, home, out = (Path(argument) for argument in sys.argv[1:])
    sys.stdin.readline()
    bench = bench_of(bundle, home / "hidden.sqlite", pause=PAUSE)
    trainer = Trainer(bench.learner, job_of(bench), home / "training.safetensors", say=print)
    while not isinstance(state := trainer.step(0.0), Done):
        done = f"reading {state.reading}" if state.reading else f"step {state.step} and {trainer._micro}"
        print(done, flush=True)
    files.write(out, wire.pack_adapter(state.arrays))


if __name__ == "__main__":
    main()
