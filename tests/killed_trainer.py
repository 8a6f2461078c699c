"""A process that trains the tiny bundle in steps of one micro-batch; tests/test_trainer.py kills it.

python -m tests.killed_trainer BUNDLE HOME OUT: prints `ready`, trains, writes the adapter to OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edge_sdk import files, wire
from edge_sdk.training.batches import Done
from edge_sdk.training.trainer import Trainer
from tests.training_helpers import bench_of, job_of

STEPS = 60


def main() -> None:
    bundle, home, out = (Path(argument) for argument in sys.argv[1:])
    bench = bench_of(bundle, home / "hidden.sqlite")
    trainer = Trainer(bench.learner, job_of(bench, steps=STEPS), home / "training.safetensors", say=print)
    print("ready", flush=True)
    while not isinstance(state := trainer.step(0.0), Done):
        pass
    files.write(out, wire.pack_adapter(state.arrays))


if __name__ == "__main__":
    main()
