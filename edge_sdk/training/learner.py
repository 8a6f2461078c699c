"""Small torch steps on a frozen base: LoRA in, LoRA out.

The learner owns a model and knows nothing of devices, versions or the wire. `lora` freezes the base and trains PEFT
adapters; `full` trains every weight and exists for the FedAvg baseline of bench/lpfl.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_sdk.adapters import AdapterSpec, Array, Arrays, mismatch, not_finite, shapes_of
from edge_sdk.bundle import Bundle
from edge_sdk.errors import DataError
from edge_sdk.softlabels import SoftLabels, SoftSet
from edge_sdk.tasks import Example, Head, Kind
from edge_sdk.tokens import Ids, PromptEncoder, by_length, pad
from edge_sdk.training import base, losses
from edge_sdk.training.batches import Training, epochs

MICRO_BATCH = 8  # sentences of similar length together: half the padding of one batch


@dataclass(frozen=True)
class Row:
    """One sequence of a step: its weight in the loss, and its class or the teacher's scores (n_classes,)."""

    ids: Ids
    weight: float
    label: int | None = None
    teacher: NDArray[np.float32] | None = None


class Learner:
    """Trains the parameters of `model` that require a gradient.

    Args:
        model: a transformers causal LM or encoder, fp32; with PEFT modules for LoRA.
        kind: how a sequence is read out: last position (decoder) or normalized mean (encoder).
        head: class rows and scale.
        encoder: tokenizes texts into the task's prompts.
    """

    def __init__(self, model: nn.Module, kind: Kind, head: Head, encoder: PromptEncoder) -> None:
        self.model = model.eval()
        self._kind = kind
        self._encoder = encoder
        self._rows = torch.from_numpy(head.rows)
        self._scale = head.scale
        self._parameters = {wire_name(name): p for name, p in model.named_parameters() if p.requires_grad}

    @classmethod
    def load(cls, bundle: Bundle, head: Head, encoder: PromptEncoder, spec: AdapterSpec, threads: int) -> Learner:
        """The bundle's original weights with LoRA, ready to train in this process.

        Sets torch's threads, and lets it take oneDNN's matrix kernels, which may round to bfloat16 on processors made for
        it: a third less time for a step, the same accuracy (docs/LOG.md). A device labels and measures with the engine.
        """
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("medium")
        return cls.lora(base.load(bundle), bundle.kind, head, encoder, spec)

    @classmethod
    def lora(cls, model: nn.Module, kind: Kind, head: Head, encoder: PromptEncoder, spec: AdapterSpec) -> Learner:
        """Freezes `model` and puts LoRA into the slots of `spec`."""
        from peft import LoraConfig, get_peft_model

        whole: Any = model  # any transformers model will do
        alpha: Any = spec.alpha  # PEFT says int and takes a float
        modules = [slot.module for slot in spec.slots]
        config = LoraConfig(r=spec.rank, lora_alpha=alpha, target_modules=modules, lora_dropout=0.1)  # `_dropout` sets it
        learner = cls(get_peft_model(whole, config), kind, head, encoder)
        if problem := mismatch(shapes_of(learner.get()), spec.shapes()):
            raise DataError(f"the training model does not fit the bundle: {problem}")
        return learner

    @classmethod
    def full(cls, model: nn.Module, kind: Kind, head: Head, encoder: PromptEncoder) -> Learner:
        """Every weight of `model` is trained."""
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return cls(model, kind, head, encoder)

    def get(self) -> dict[str, Array]:
        return {name: p.detach().cpu().numpy().astype(np.float32) for name, p in self._parameters.items()}

    def set(self, arrays: Arrays) -> None:
        """Raises: DataError: names or shapes are not those of the trained parameters."""
        shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        if problem := mismatch(shapes_of(arrays), shapes):
            raise DataError(problem)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(arrays[name])))

    def fit(
        self,
        start: Arrays,
        labelled: Sequence[Example],
        unlabelled: Sequence[str],
        soft_set: SoftSet | None,
        training: Training,
        soft: SoftLabels | None,
        rng: np.random.Generator,
    ) -> tuple[dict[str, Array], float]:
        """Runs `training.steps` AdamW steps from `start`; the loss is hard + soft.weight * soft.

        Args:
            start: the arrays to start from; not changed.
            labelled: texts with class indices.
            unlabelled: all unlabelled texts; `soft_set` says which are used and what the teacher thinks of them.
            rng: orders the examples and drops activations.

        Returns:
            The trained arrays and the mean loss over the steps.

        Raises:
            DataError: no labelled text, or a loss that is not finite (`start` stays good).
        """
        if not labelled:
            raise DataError("training needs at least one labelled text; add some with `edge-agent add`")
        self.set(start)
        known = self._encoder.prompts([e.text for e in labelled])
        chosen = self._encoder.prompts([unlabelled[i] for i in soft_set.indices]) if soft_set is not None else []
        optimizer = torch.optim.AdamW(self._parameters.values(), lr=training.learning_rate, weight_decay=0.0)
        n_soft = len(soft_set) if soft_set is not None and soft is not None else 0
        soft_order = epochs(n_soft, soft.batch_size if soft else 1, training.steps, rng)
        total = 0.0
        with self._dropout(training.dropout, seed=int(rng.integers(2**31))):
            for hard_batch in epochs(len(labelled), training.batch_size, training.steps, rng):
                soft_batch = next(soft_order)
                rows = [Row(known[i], 1 / len(hard_batch), label=labelled[i].label) for i in hard_batch]
                if soft_set is not None and soft is not None:
                    share = soft.weight / max(len(soft_batch), 1)
                    rows += [Row(chosen[i], share, teacher=soft_set.scores[i]) for i in soft_batch]
                optimizer.zero_grad(set_to_none=True)
                loss = self._accumulate(rows, soft.temperature if soft else 1.0)
                if not math.isfinite(loss):
                    raise DataError("the training loss is not finite; lower training.learning_rate")
                nn.utils.clip_grad_norm_(self._parameters.values(), training.clip)
                optimizer.step()
                total += loss
        trained = {name: array.copy() for name, array in self.get().items()}
        if name := not_finite(trained):
            raise DataError(f"training drove {name} to infinity; lower training.learning_rate")
        return trained, total / training.steps

    @contextmanager
    def _dropout(self, share: float, seed: int) -> Iterator[None]:
        """Training mode with this dropout everywhere and a generator of its own; evaluation mode afterwards."""
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = share
            for name in ("dropout_prob", "attention_dropout"):  # attention drops by a number, not by a module
                if hasattr(module, name):
                    setattr(module, name, share)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model.train()
            try:
                yield
            finally:
                self.model.eval()

    def _accumulate(self, rows: Sequence[Row], temperature: float) -> float:
        """Adds the gradient of the rows' weighted losses in micro-batches of similar length; returns the loss."""
        total = 0.0
        for batch in by_length([row.ids for row in rows], MICRO_BATCH):
            group = [rows[i] for i in batch]
            scores = self._scores([row.ids for row in group])
            loss = scores.new_zeros(())
            hard = [i for i, row in enumerate(group) if row.teacher is None]
            soft = [i for i, row in enumerate(group) if row.teacher is not None]
            weights = torch.tensor([row.weight for row in group])
            if hard:
                labels = torch.tensor([group[i].label for i in hard])
                loss = loss + weights[hard] @ losses.hard(scores[hard], labels)
            if soft:
                teacher = torch.from_numpy(np.stack([t for row in group if (t := row.teacher) is not None]))
                loss = loss + weights[soft] @ losses.soft(scores[soft], teacher, temperature)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def scores(self, texts: Sequence[str], batch_size: int = 32) -> NDArray[np.float32]:
        """Class scores (n, n_classes) of the model as it stands."""
        sequences = self._encoder.prompts(texts)
        out = np.zeros((len(sequences), len(self._rows)), np.float32)
        for batch in by_length(sequences, batch_size):
            out[batch] = self._scores([sequences[i] for i in batch]).numpy()
        return out

    def _scores(self, sequences: Sequence[Ids]) -> Tensor:
        return self._scale * readout(self.model, self._kind, sequences) @ self._rows.T


def readout(model: Any, kind: Kind, sequences: Sequence[Ids]) -> Tensor:
    """What the model makes of each sequence, (n, width): the decoder's last position, the encoder's unit-length mean."""
    ids, mask = (torch.from_numpy(a) for a in pad(sequences))
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    if kind == "decoder":
        hidden = bare.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(ids)), mask.sum(1) - 1]  # type: ignore[no-any-return]
    hidden = bare(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[:, :, None].to(hidden.dtype)
    return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)


def wire_name(name: str) -> str:
    """PEFT's parameter name in a live model -> its name in a file (the adapter's own name is dropped)."""
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")
