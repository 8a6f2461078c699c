"""Small steps: interrupted anywhere they end at the same bytes, and whatever goes wrong leaves the start as it was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from edge_sdk import wire
from edge_sdk.errors import DataError
from edge_sdk.tasks import Task
from edge_sdk.training.batches import Done, Job, Progress, Row, Source, Training
from edge_sdk.training.trainer import Trainer
from tests.killed_trainer import STEPS
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
    assert same(finish(Trainer(bench.learner, job, path, say=pytest.fail)), whole)  # at its end there is nothing left to do


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
    said = list[str]()
    taken = finish(Trainer(bench.learner, others[change], path, say=said.append))

    assert same(taken, finish(Trainer(bench.learner, others[change])))
    assert said == [f"{path} is of another training; training starts at its beginning"]


@pytest.mark.parametrize("change", ["trunk", "alpha", "freeze_a", "head"])
def test_a_checkpoint_of_another_learner_is_not_taken_up(decoder_bundle: Path, tmp_path: Path, change: str) -> None:
    """Under another trunk, another alpha or frozen factors, or with other class rows, the same job begins anew."""
    kept, path, said = bench_of(decoder_bundle), tmp_path / "training.safetensors", list[str]()
    others = {
        "trunk": lambda: bench_of(decoder_bundle, trunk=0.5),
        "alpha": lambda: bench_of(decoder_bundle, alpha=8.0),
        "freeze_a": lambda: bench_of(decoder_bundle, freeze_a=True),
        "head": lambda: bench_of(decoder_bundle, task=Task(("no", "yes"), "{text} it was", (("dull",), ("nice",)))),
    }
    other, job = others[change](), job_of(kept)
    trainer = Trainer(kept.learner, job, path)
    for _ in range(9):
        trainer.step(0.0)
    Trainer(bench_of(decoder_bundle).learner, job, path, say=pytest.fail)  # the same learner, made again, takes it up

    assert same(finish(Trainer(other.learner, job, path, say=said.append)), whole := finish(Trainer(other.learner, job)))
    assert not same(finish(trainer), whole)
    assert said == [f"{path} is of another training; training starts at its beginning"]


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


def read(checkpoint: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Its metadata and its tensors."""
    with safe_open(checkpoint, framework="pt") as file:
        return file.metadata(), load(checkpoint.read_bytes())


def test_a_checkpoint_with_a_changed_digit_is_not_taken_up(bench: Workbench, tmp_path: Path) -> None:
    """Any digit of the job's name, the position or the sum turned into any other: said, and the training starts afresh."""
    job, path = job_of(bench), tmp_path / "training.safetensors"
    whole, trainer = finish(Trainer(bench.learner, job)), Trainer(bench.learner, job, path)
    trainer.step(0.0)
    first, _ = read(path)
    for _ in range(8):
        trainer.step(0.0)
    metadata, tensors = read(path)
    assert metadata.keys() == {"job", "position", "sum"}
    for name, text in metadata.items():
        for at in (at for at, letter in enumerate(text) if letter.isdigit()):
            for digit in set("0123456789") - {text[at]}:
                path.write_bytes(save(tensors, {**metadata, name: text[:at] + digit + text[at + 1 :]}))
                said = list[str]()
                trainer = Trainer(bench.learner, job, path, say=said.append)

                assert len(said) == 1, (name, at, digit)
                assert not path.exists()
            trainer.step(0.0)
            assert read(path)[0] == first, (name, at)  # with its sum, so it goes on as undisturbed
        assert same(finish(trainer), whole)


@pytest.mark.parametrize("position", [(7, 0), (6, 1), (-1, 0), (3, 9), (3, -1)])
def test_a_position_that_does_not_exist_is_damage(bench: Workbench, tmp_path: Path, position: tuple[int, int]) -> None:
    """A checkpoint with its right sum at a step or micro-batch that the job does not have: said, and made anew."""
    job, path, said = job_of(bench, steps=6), tmp_path / "training.safetensors", list[str]()
    whole, trainer = finish(Trainer(bench.learner, job)), Trainer(bench.learner, job, path)
    for _ in range(9):
        trainer.step(0.0)
    trainer._step, trainer._micro = position
    trainer._keep()

    assert same(finish(Trainer(bench.learner, job, path, say=said.append)), whole)
    assert said == [f"{path} is damaged (ValueError); training starts at its beginning"]


class Life:
    """A process of tests/killed_trainer.py; it has its libraries and waits, and goes on in `home` once told to."""

    def __init__(self, bundle: Path, home: Path) -> None:
        home.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.killed_trainer", str(bundle), str(home), str(home / "out")],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def lines(self) -> Iterator[str]:
        """What it says, as it says it: the position that it has reached and kept."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        yield from (line.strip() for line in self.process.stdout)

    def end(self) -> None:
        """Kills it where it runs; the pipes are closed."""
        self.process.kill()
        self.process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_end_at_the_undisturbed_bytes(decoder_bundle: Path, tmp_path: Path) -> None:
    """SIGKILL at 20 random moments of filling the cache and of training, all over the run: the adapter is byte for byte the
    undisturbed one, and no checkpoint was ever damaged.
    """
    rng, home = random.Random(4), tmp_path / "killed"
    lives = [Life(decoder_bundle, tmp_path / "undisturbed"), Life(decoder_bundle, home)]
    try:
        times = {line: time.monotonic() for line in lives[0].lines()}
        assert lives[0].process.wait() == 0
        whole, places = (tmp_path / "undisturbed" / "out").read_bytes(), list(times)
        pace = (times[places[-1]] - times[places[0]]) / len(places)
        goals, reached = list[int](), list[int]()
        for number in count(1):
            if len(reached) < KILLS and not goals:  # one in each share of the run; anew if it came to its end too early
                left = KILLS - len(reached)
                goals = [int(rng.uniform(k, k + 1) * (len(places) - 1) / left) for k in range(left)]
            lives.append(Life(decoder_bundle, home))  # one more than now runs: it loads its libraries meanwhile
            life, lines, last = lives[number], lives[number].lines(), -1
            for line in lines:
                before, last = last, places.index(line)  # a place it came to undisturbed too, and nothing said of damage
                assert last > before
                if goals and last >= goals[0]:
                    time.sleep(rng.uniform(0.0, 2.0) * pace)
                    life.process.kill()
                    goals.pop(0)
                    break
            rest = [places.index(line) for line in lines]
            if life.process.wait() == -signal.SIGKILL:
                reached.append(max([last, *rest]))
                continue
            assert (home / "out").read_bytes() == whole
            if len(reached) == KILLS:
                break
            for path in home.iterdir():
                path.unlink()
    finally:
        for life in lives:
            life.end()
    places_of_kills = [places[at] for at in reached]
    print(f"{len(places)} places, {pace * 1e3:.0f} ms each; killed after: {', '.join(places_of_kills)}")
    steps = [int(place.split()[1]) for place in places_of_kills if place.startswith("step")]

    assert len(reached) == KILLS
    assert any(place.startswith("reading") for place in places_of_kills)
    assert any(step < STEPS / 2 for step in steps)
    assert any(step >= STEPS * 3 / 4 for step in steps)


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


@pytest.mark.parametrize(("what", "said"), [("loss", "the training loss is not finite"), ("weight", "to infinity")])
def test_a_good_checkpoint_goes_with_what_is_not_finite(
    decoder_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, said: str
) -> None:
    """A loss, or a gradient and so a weight, that overflows after a good step: the checkpoint of that step is gone."""
    bench, path = bench_of(decoder_bundle), tmp_path / "training.safetensors"
    trainer, real = Trainer(bench.learner, job_of(bench, steps=1), path), bench.learner.accumulate
    trainer.step(0.0)
    assert path.exists()

    def overflow(rows: Sequence[tuple[Row, float]]) -> float:
        loss = real(rows)
        for parameter in bench.learner.parameters.values():
            parameter.grad = torch.full_like(parameter, torch.inf)
        return float("nan") if what == "loss" else loss

    monkeypatch.setattr(bench.learner, "accumulate", overflow)
    with pytest.raises(DataError, match=said):
        finish(trainer)

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


def test_memory_short_for_one_text_is_an_error_that_helps(
    decoder_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where not even one row fits, the device is told to train fewer layers, and the checkpoint stays."""
    bench, path = bench_of(decoder_bundle), tmp_path / "training.safetensors"
    trainer = Trainer(bench.learner, job_of(bench), path)
    trainer.step(0.0)
    before = path.read_bytes()
    monkeypatch.setattr(bench.learner, "accumulate", ShortOfMemory(bench, 0))
    with pytest.raises(DataError, match="--layers"):
        finish(trainer)

    assert path.read_bytes() == before


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


@pytest.mark.parametrize("clip", [1e-6, 1e6])
def test_a_step_is_adams_on_the_clipped_gradient(decoder_bundle: Path, clip: float) -> None:
    """One step by hand: the gradient brought down to the norm `clip`, or left where it is smaller, then AdamW's first step."""
    bench, rate = bench_of(decoder_bundle, micro_tokens=24), 0.01
    start = {n: a + np.float32(0.05) for n, a in bench.spec.start(1).items()}
    job = Job(start, job_of(bench).sources, Training(1, 7, rate, clip, dropout=0.0), 0)
    bench.learner.set(start)
    bench.learner.accumulate(next(job.steps()))
    gradient = {n: p.grad.numpy().astype(np.float64) for n, p in bench.learner.parameters.items() if p.grad is not None}
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    assert 1e-6 < norm < 1e6
    trained = finish(Trainer(bench.learner, job)).arrays

    assert gradient.keys() == trained.keys()
    for name, whole in gradient.items():
        g = whole * min(1.0, clip / norm)
        expected = start[name] - rate * g / (np.abs(g) + 1e-8)  # both moments are corrected to g and g^2
        np.testing.assert_allclose(trained[name], expected, rtol=0, atol=2e-5)


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
