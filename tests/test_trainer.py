"""Small steps: interrupted anywhere they end at the same bytes, and whatever goes wrong leaves the start as it was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edge_sdk import wire
from edge_sdk.errors import DataError
from edge_sdk.training.batches import Done, Job, Progress, Row, Source, Training
from edge_sdk.training.trainer import Trainer
from tests.training_helpers import Workbench, bench_of, job_of

ROOT = Path(__file__).parent.parent
KILLS = 20


@pytest.fixture(scope="module")
def bench(decoder_bundle: Path) -> Workbench:
    return bench_of(decoder_bundle)


def finish(trainer: Trainer, budget: float = 0.0) -> Done:
    while not isinstance(state := trainer.step(budget), Done):
        assert isinstance(state, Progress)
    return state


def same(a: Done, b: Done) -> bool:
    return wire.pack_adapter(a.arrays) == wire.pack_adapter(b.arrays) and a.loss == b.loss


def test_the_length_of_steps_changes_nothing(bench: Workbench) -> None:
    """One long step, and many of one micro-batch each, end at the same bytes."""
    job = job_of(bench)

    assert same(finish(Trainer(bench.learner, job), float("inf")), finish(Trainer(bench.learner, job)))


def test_a_training_goes_on_where_it_was(bench: Workbench, tmp_path: Path) -> None:
    """A new trainer after every step, in the middle of gradient accumulation too, ends at the undisturbed bytes."""
    job, path = job_of(bench), tmp_path / "training.safetensors"
    whole = finish(Trainer(bench.learner, job))
    positions, state = [], None
    while not isinstance(state, Done):
        state = Trainer(bench.learner, job, path).step(0.0)
        positions.append(state)

    assert same(state, whole)
    assert len(positions) > job.training.steps  # some steps were left half done


@pytest.mark.parametrize("change", ["seed", "steps", "start", "rows"])
def test_a_checkpoint_of_another_job_is_not_taken_up(bench: Workbench, tmp_path: Path, change: str) -> None:
    """Whatever a job's result depends on is part of its name."""
    job, path = job_of(bench), tmp_path / "training.safetensors"
    Trainer(bench.learner, job, path).step(0.0)
    others = {
        "seed": Job(job.start, job.sources, job.training, 9),
        "steps": job_of(bench, steps=7),
        "start": Job(bench.spec.start(5), job.sources, job.training, 0),
        "rows": Job(job.start, job.sources[:1], job.training, 0),
    }
    taken = finish(Trainer(bench.learner, others[change], path))

    assert same(taken, finish(Trainer(bench.learner, others[change])))


def test_a_checkpoint_of_other_micro_batches_is_not_taken_up(decoder_bundle: Path, tmp_path: Path) -> None:
    """A device told to hold fewer or more texts at a time begins anew: the checkpoint counts micro-batches of another size."""
    for before, after in ((3, 100), (100, 3)):
        path = tmp_path / f"{before}.safetensors"
        kept, other = bench_of(decoder_bundle, micro_tokens=before), bench_of(decoder_bundle, micro_tokens=after)
        trainer = Trainer(kept.learner, job_of(kept), path)
        for _ in range(2):
            trainer.step(0.0)

        assert same(finish(Trainer(other.learner, job_of(other), path)), finish(Trainer(other.learner, job_of(other))))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_checkpoint_is_said_and_left(bench: Workbench, tmp_path: Path, damage: str) -> None:
    """A checkpoint that is cut, changed in one bit, empty or no checkpoint at all: training starts at its beginning."""
    job, path = job_of(bench), tmp_path / "training.safetensors"
    whole, said = finish(Trainer(bench.learner, job)), list[str]()
    trainer = Trainer(bench.learner, job, path)
    for _ in range(9):
        trainer.step(0.0)
    body = bytearray(path.read_bytes())
    body[-9] ^= 4
    path.write_bytes({"cut": bytes(body[:-50]), "flip": bytes(body), "empty": b"", "other": b"hello" * 99}[damage])

    assert same(finish(Trainer(bench.learner, job, path, say=said.append)), whole)
    assert len(said) == 1
    assert "damaged" in said[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_end_at_the_undisturbed_bytes(decoder_bundle: Path, tmp_path: Path) -> None:
    """SIGKILL at 20 random moments of training and of filling the cache: the adapter is byte for byte the undisturbed one."""
    rng = random.Random(4)

    def start(home: Path) -> subprocess.Popen[str]:
        home.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "tests.killed_trainer", str(decoder_bundle), str(home), str(home / "out")]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    undisturbed = start(tmp_path / "undisturbed")
    assert undisturbed.wait(timeout=120) == 0
    kills = 0
    home = tmp_path / "killed"
    while kills < KILLS:
        process = start(home)
        try:
            process.wait(timeout=rng.uniform(0.0, 0.12))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        else:  # it came to its end before enough kills: begin again
            assert (home / "out").read_bytes() == (tmp_path / "undisturbed" / "out").read_bytes()
            for path in home.iterdir():
                path.unlink()
    assert start(home).wait(timeout=120) == 0
    print(f"{kills} kills")

    assert (home / "out").read_bytes() == (tmp_path / "undisturbed" / "out").read_bytes()


# What goes wrong ------------------------------------------------------------------------------------------------------
def test_a_loss_that_is_not_finite_ends_the_training(bench: Workbench, tmp_path: Path) -> None:
    """A rate that drives the loss to NaN is named, and the poisoned checkpoint is gone."""
    rows = job_of(bench).sources[0].rows
    poison = {name: np.full_like(array, 3e38) for name, array in bench.spec.start(1).items()}
    path = tmp_path / "training.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(DataError, match="not finite"):
        finish(Trainer(bench.learner, Job(poison, [Source(rows, 4)], Training(steps=3), 0), path))

    assert not path.exists()


class ShortOfMemory:
    """A learner's accumulate that fails for more than `most` rows."""

    def __init__(self, bench: Workbench, most: int) -> None:
        self.real, self.most, self.sizes = bench.learner.accumulate, most, list[int]()

    def __call__(self, rows: Sequence[tuple[Row, float]]) -> float:
        self.sizes.append(len(rows))
        if len(rows) > self.most:
            self.real(rows)  # the gradient is half there when memory runs out
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")
        return self.real(rows)


def test_short_memory_halves_the_micro_batch(decoder_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in a micro-batch: its halves are tried, and the gradient is the same as with enough."""
    bench = bench_of(decoder_bundle)
    job = job_of(bench, dropout=0.0)
    whole = finish(Trainer(bench.learner, job))
    short = ShortOfMemory(bench, 1)
    monkeypatch.setattr(bench.learner, "accumulate", short)
    halved = finish(Trainer(bench.learner, job))

    assert max(short.sizes) > 1
    for name, array in whole.arrays.items():
        np.testing.assert_allclose(halved.arrays[name], array, atol=1e-4)


def test_memory_short_for_one_text_is_an_error_that_helps(decoder_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even one row fits, the device is told to train fewer layers."""
    bench = bench_of(decoder_bundle)
    monkeypatch.setattr(bench.learner, "accumulate", ShortOfMemory(bench, 0))
    with pytest.raises(DataError, match="--layers"):
        finish(Trainer(bench.learner, job_of(bench)))


def test_a_full_disk_keeps_the_last_checkpoint(bench: Workbench, tmp_path: Path) -> None:
    """A checkpoint that cannot be written is an error that says so; the one before stays."""
    job, path = job_of(bench), tmp_path / "training.safetensors"
    trainer = Trainer(bench.learner, job, path)
    trainer.step(0.0)
    before = path.read_bytes()
    (tmp_path / "training.safetensors.part").mkdir()  # writing aside fails, as on a full disk
    with pytest.raises(DataError, match="cannot be kept"):
        trainer.step(0.0)

    assert path.read_bytes() == before


# What is learned ------------------------------------------------------------------------------------------------------
def test_micro_batches_add_up_to_the_whole_gradient(decoder_bundle: Path) -> None:
    """Gradient accumulation over micro-batches of 3 is the gradient of the whole batch."""
    gradients: list[dict[str, Tensor]] = []
    for size in (3, 100):
        bench = bench_of(decoder_bundle, micro_tokens=size)
        bench.learner.set({n: a + 0.05 for n, a in bench.spec.start(1).items()})
        trainer = Trainer(bench.learner, job_of(bench, steps=1, dropout=0.0))
        rows = next(trainer._steps)
        for start in range(0, len(rows), size):
            bench.learner.accumulate(rows[start : start + size])
        gradients.append({n: p.grad.clone() for n, p in bench.learner.parameters.items() if p.grad is not None})

    assert gradients[0].keys() == bench.spec.shapes().keys()
    for name, whole in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], whole, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_training_lowers_the_loss(kind: str, request: pytest.FixtureRequest) -> None:
    """Sixty steps on labels that words tell make the loss a good deal smaller, for both kinds of model."""
    bench = bench_of(request.getfixturevalue(f"{kind}_bundle"), layers=2)
    rows = job_of(bench).sources[0].rows
    bench.learner.set(bench.spec.start(1))
    before = float(bench.learner.losses(rows).mean().detach())
    bench.learner.fit(Job(bench.spec.start(1), [Source(rows, 12)], Training(60, 12, 0.03, dropout=0.0), 0))

    assert float(bench.learner.losses(rows).mean().detach()) < 0.8 * before


def test_a_frozen_a_stays_as_it_was(decoder_bundle: Path) -> None:
    """FFA-LoRA: only B moves, and only B is in an update's shapes."""
    bench = bench_of(decoder_bundle, freeze_a=True)
    job = job_of(bench)
    trained, _ = bench.learner.fit(job)
    moved = {name for name, array in trained.items() if (array != job.start[name]).any()}

    assert moved == bench.spec.update_shapes().keys() == {slot.b for slot in bench.spec.slots}
