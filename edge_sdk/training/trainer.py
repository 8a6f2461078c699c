"""Training in small, time-boxed steps that survive `kill -9`: a checkpoint after each, and the same bytes at the end.

A step ends between two micro-batches, once its budget is used. What is kept is the adapter, the gradient gathered so far,
the optimizer's moments and the position; everything random is drawn from the job's seed and the position, so a training that
was interrupted anywhere, any number of times, ends as one that never was (on the same machine, with as many threads).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from edge_sdk import files
from edge_sdk.adapters import not_finite
from edge_sdk.errors import DataError
from edge_sdk.tokens import by_tokens
from edge_sdk.training.batches import Done, Job, Progress, Row
from edge_sdk.training.learner import Learner

MOMENTS = ("exp_avg", "exp_avg_sq")


class Trainer:
    """One job on one learner.

    Args:
        learner: its parameters are set to the job's start, or to what the checkpoint holds.
        checkpoint: a file kept after every step, and taken up if it is of this very job and learner, in micro-batches of this
            size; None keeps nothing.
        clock: seconds, for the budget.
        say: told in one line when a checkpoint cannot be used.

    Raises:
        DataError: the job's arrays are not the learner's.
    """

    def __init__(
        self,
        learner: Learner,
        job: Job,
        checkpoint: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._learner, self._job, self._checkpoint, self._clock, self._say = learner, job, checkpoint, clock, say
        learner.set(job.start)
        self._free = {name: p for name, p in learner.parameters.items() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(self._free.values(), lr=job.training.learning_rate, weight_decay=0.0, foreach=False)
        self._optimizer.zero_grad(set_to_none=True)
        self._step, self._micro, self._losses, self._loss = 0, 0, 0.0, 0.0
        self._name = f"{job.key} {learner.identity} {learner.micro_tokens}"  # a position counts micro-batches of this size
        self._steps: Iterator[list[tuple[Row, float]]] = job.steps()
        self._rows: list[list[tuple[Row, float]]] | None = None  # of the step under way, in micro-batches
        if checkpoint is not None and checkpoint.exists():
            self._resume(checkpoint)
        self._unread = [] if learner.trunk is None else learner.trunk.missing([row.ids for row in job.rows])

    def step(self, budget: float) -> Progress | Done:
        """Works for about `budget` seconds, at least one micro-batch or one chunk of texts, and keeps what it reached.

        Raises:
            DataError: the loss or a weight is not finite, memory is short even for one row, or the disk is full. The job's
            start is untouched; the checkpoint is gone if a number was not finite, and stays as it was otherwise.
        """
        end = self._clock() + budget
        if self._unread and self._learner.trunk is not None:
            self._unread = self._learner.trunk.advance(self._unread, budget, self._clock)
            if self._unread or self._clock() >= end:
                return self._progress()
        while self._step < self._job.training.steps:
            self._micro_step()
            if self._clock() >= end:
                break
        self._keep()
        return self._progress() if self._step < self._job.training.steps else self._done()

    def forget(self) -> None:
        """Deletes the checkpoint."""
        if self._checkpoint is not None:
            self._checkpoint.unlink(missing_ok=True)

    # One micro-batch --------------------------------------------------------------------------------------------------
    def _micro_step(self) -> None:
        """Adds one micro-batch's gradient; with the last one of a step, moves the weights."""
        if self._rows is None:
            self._rows = self._batches(next(self._steps))
        training, place = self._job.training, (self._job.seed, self._step, self._micro)
        seed = int(np.random.SeedSequence(place).generate_state(1)[0])
        with self._learner.training(training.dropout, seed):
            self._loss += self._accumulate(self._rows[self._micro])
        if not math.isfinite(self._loss):
            self.forget()
            raise DataError("the training loss is not finite; lower training.learning_rate")
        self._micro += 1
        if self._micro == len(self._rows):
            nn.utils.clip_grad_norm_(self._free.values(), training.clip)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._losses += self._loss
            self._step, self._micro, self._loss, self._rows = self._step + 1, 0, 0.0, None

    def _batches(self, rows: list[tuple[Row, float]]) -> list[list[tuple[Row, float]]]:
        return [[rows[i] for i in batch] for batch in by_tokens([row.ids for row, _ in rows], self._learner.micro_tokens)]

    def _accumulate(self, rows: list[tuple[Row, float]]) -> float:
        """The gradient of a micro-batch; in halves where memory is short."""
        before = {name: None if p.grad is None else p.grad.clone() for name, p in self._free.items()}
        try:
            return self._learner.accumulate(rows)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            for name, parameter in self._free.items():
                parameter.grad = before[name]
        if len(rows) == 1:
            raise DataError("out of memory in a training step of one text; train fewer layers (--layers), or free memory")
        half = len(rows) // 2
        return self._accumulate(rows[:half]) + self._accumulate(rows[half:])

    def _progress(self) -> Progress:
        return Progress(len(self._unread), self._step, self._job.training.steps)

    def _done(self) -> Done:
        arrays = self._learner.get()
        if name := not_finite(arrays):
            self.forget()
            raise DataError(f"training drove {name} to infinity; lower training.learning_rate")
        return Done(arrays, self._losses / self._job.training.steps)

    # The checkpoint ---------------------------------------------------------------------------------------------------
    def _keep(self) -> None:
        """Raises: DataError: the disk is full or not writable; the last checkpoint stays."""
        if self._checkpoint is None:
            return
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._free.items():
            tensors[f"value:{name}"] = parameter.detach()
            if parameter.grad is not None:
                tensors[f"grad:{name}"] = parameter.grad
            for moment in MOMENTS if parameter in self._optimizer.state else ():
                tensors[f"{moment}:{name}"] = self._optimizer.state[parameter][moment]
        place = {"step": self._step, "micro": self._micro, "loss": self._loss, "losses": self._losses}
        position = json.dumps(place)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        body = save(tensors, {"job": self._name, "position": position, "sum": _sum(tensors, self._name, position)})
        try:
            files.write(self._checkpoint, body)
        except OSError as error:
            raise DataError(f"training cannot be kept in {self._checkpoint} ({error.strerror}); free some disk") from error

    def _resume(self, path: Path) -> None:
        """Takes up a checkpoint; one of another job or learner, or a damaged one, is said and deleted."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata["job"] != self._name:
                    self._say(f"{path} is of another training; training starts at its beginning")
                    self.forget()
                    return
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # it is no dict
            if _sum(tensors, self._name, metadata["position"]) != metadata["sum"]:
                raise ValueError("the tensors and the position do not fit their sum")
            position = json.loads(metadata["position"])
            step, micro = int(position["step"]), int(position["micro"])
            steps = islice(self._job.steps(), step, None)
            rows = self._batches(next(steps, []))  # of the last step's end: none
            if step > self._job.training.steps or not 0 <= micro < max(len(rows), 1):
                raise ValueError("no such position")
            values = {name: tensors[f"value:{name}"] for name in self._free}
            moments = {n: {m: tensors[f"{m}:{n}"] for m in MOMENTS} for n in self._free} if step else {}
            self._losses, self._loss = float(position["losses"]), float(position["loss"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            self._say(f"{path} is damaged ({type(error).__name__}); training starts at its beginning")
            self.forget()
            return
        self._step, self._micro, self._steps, self._rows = step, micro, steps, rows
        with torch.no_grad():
            for name, parameter in self._free.items():
                parameter.copy_(values[name])
                parameter.grad = tensors.get(f"grad:{name}")
                if moments:
                    self._optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments[name]}


def _sum(tensors: dict[str, Tensor], job: str, position: str) -> str:
    """A checksum of all that a checkpoint says."""
    digest = hashlib.sha256(f"{job}\n{position}".encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {tensors[name].dtype} {tuple(tensors[name].shape)} ".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _out_of_memory(error: Exception) -> bool:
    said = str(error)
    return isinstance(error, MemoryError) or "can't allocate memory" in said or "not enough memory" in said
