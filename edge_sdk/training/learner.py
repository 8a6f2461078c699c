"""LoRA in torch: which parameters are trained, and the gradient of a few rows at a time.

The learner owns parameters and knows nothing of devices, versions, the wire or time; `trainer.py` takes the steps. `split`
trains the top layers on cached hidden states and is what devices use; `whole` holds the whole model and `full` trains every
weight of it, for comparisons.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_sdk.adapters import AdapterSpec, Array, Arrays, mismatch, shapes_of
from edge_sdk.bundle import Bundle
from edge_sdk.engines import Engine
from edge_sdk.errors import DataError
from edge_sdk.tasks import Head, Kind, Task
from edge_sdk.tokens import Ids, PromptEncoder, by_length
from edge_sdk.training import base, losses
from edge_sdk.training.batches import Answer, Classes, Done, Guess, Job, Label, Row, TopTokens
from edge_sdk.training.hidden import HiddenStates

States = Callable[[Sequence[Ids], Sequence[int]], tuple[Tensor, Tensor]]
MICRO_TOKENS = 512  # a batch of sentences; fewer take less memory and more time (docs/training.md)


class Learner:
    """Turns rows into gradients of named parameters.

    Args:
        model: holds the parameters, and the dropout layers that training mode switches on.
        parameters: what is trained, by wire name.
        states: sequences, and the first position of each that is read out -> final hidden states (n, longest, width), right
            from these positions on, and mask (n, longest); differentiable.
        kind: how a sequence is read out: last position (decoder) or normalized mean (encoder).
        head: class rows and scale; None for a task without classes.
        encoder: tokenizes texts into the task's prompts.
        identity: names all that a gradient depends on, but for the parameters, the rows and `micro_tokens`.
        vocabulary: output embeddings (V, width), for losses over tokens.
        trunk: where the hidden states of the frozen layers come from, if they are split off.
        micro_tokens: tokens in memory at a time; the step's gradient is accumulated.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        states: States,
        kind: Kind,
        head: Head | None,
        encoder: PromptEncoder,
        identity: str,
        vocabulary: Tensor | None = None,
        trunk: HiddenStates | None = None,
        micro_tokens: int = MICRO_TOKENS,
    ) -> None:
        self.model = model.eval()
        self.parameters = parameters
        self.trunk = trunk
        self.identity = identity
        self.micro_tokens = micro_tokens
        self._states, self._kind, self.encoder, self._vocabulary = states, kind, encoder, vocabulary
        self._head = None if head is None else (torch.from_numpy(head.rows), head.scale)

    @classmethod
    def split(
        cls,
        folder: Path,
        bundle: Bundle,
        head: Head | None,
        encoder: PromptEncoder,
        spec: AdapterSpec,
        trunk: HiddenStates,
        layers: int,
        *,
        threads: int = 1,
        micro_tokens: int = MICRO_TOKENS,
    ) -> Learner:
        """The top `layers` layers with LoRA on cached hidden states; all other layers stay in the engine.

        Args:
            folder: a bundle with the files of `bundle.trains(layers)`, verified.
            head: the engine's class rows; None for a task whose answers are text.
            spec: slots inside these layers, the rank, and whether only the B factors are trained (FFA-LoRA).
            trunk: gives what enters the lowest of these layers.
        """
        _prepare(threads)
        model: Any = _with_lora(base.load_top(folder, bundle, layers), spec, lambda m: base.inside(bundle, layers, m))
        bare, decoder = model.get_base_model(), bundle.kind == "decoder"
        spared: list[base.Only] = []

        def states(sequences: Sequence[Ids], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
            entering = [torch.from_numpy(array) for array in trunk.read(sequences)]
            below = nn.utils.rnn.pad_sequence(entering, batch_first=True)
            mask = torch.zeros(below.shape[:2], dtype=torch.int64)
            for row, ids in enumerate(sequences):
                mask[row, : len(ids)] = 1
            for part in spared:
                part.at = torch.where(_from(starts, mask))
            # padding is on the right, so causal attention never sees it
            out = bare(inputs_embeds=below, use_cache=False) if decoder else bare(inputs_embeds=below, attention_mask=mask)
            return out.last_hidden_state, mask

        names = {f"base_model.model.{base.inside(bundle, layers, slot.module)}": slot for slot in spec.slots}
        parameters = {}
        for name, parameter in model.named_parameters():
            place, _, factor = name.partition(".lora_")
            if factor:
                slot = names[place]
                parameter.requires_grad_(not (spec.freeze_a and factor.startswith("A")))
                parameters[slot.a if factor.startswith("A") else slot.b] = parameter
        spared += base.spare(bare) if decoder else []
        vocabulary = base.load_vocabulary(folder) if head is None else None
        identity = _identity("split", bundle, head, spec, layers, trunk.key)
        return cls(model, parameters, states, bundle.kind, head, encoder, identity, vocabulary, trunk, micro_tokens)

    @classmethod
    def beside(cls, engine: Engine, folder: Path, bundle: Bundle, spec: AdapterSpec, task: Task, threads: int = 1) -> Learner:
        """Split training of all of `spec` beside an engine of this process; what the engine computes is kept in memory.

        Below the lowest slot the engine must do without an adapter, so this one takes its adapter off.
        """
        split = min(slot.layer for slot in spec.slots)
        known: dict[tuple[int, ...], Array] = {}

        def compute(sequences: Sequence[Ids]) -> list[Array]:
            if new := [list(ids) for ids in dict.fromkeys(map(tuple, sequences)) if ids not in known]:
                engine.set_adapter(None)
                known.update(zip(map(tuple, new), engine.hidden(new, split), strict=True))
            return [known[tuple(ids)] for ids in sequences]

        head = None if task.answer_tokens else engine.head
        states, layers = HiddenStates(compute, "", None), bundle.layers - split
        return cls.split(folder, bundle, head, engine.encoder, spec, states, layers, threads=threads)

    @classmethod
    def whole(cls, bundle: Bundle, head: Head, encoder: PromptEncoder, spec: AdapterSpec, threads: int = 1) -> Learner:
        """The bundle's whole base with LoRA: the reference that split training is compared with."""
        _prepare(threads)
        model = _with_lora(base.load(bundle), spec, lambda module: module)
        parameters = {_wire_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        identity = _identity("whole", bundle, head, spec)
        return cls(model, parameters, _whole(model, bundle.kind), bundle.kind, head, encoder, identity)

    @classmethod
    def full(cls, bundle: Bundle, head: Head, encoder: PromptEncoder, threads: int = 1) -> Learner:
        """Every weight of the base is trained."""
        _prepare(threads)
        model = base.load(bundle)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        parameters, identity = dict(model.named_parameters()), _identity("full", bundle, head)
        return cls(model, parameters, _whole(model, bundle.kind), bundle.kind, head, encoder, identity)

    def get(self) -> dict[str, Array]:
        """A copy of the arrays as they stand."""
        return {name: np.array(p.detach().numpy(), np.float32) for name, p in self.parameters.items()}

    def set(self, arrays: Arrays) -> None:
        """Raises: DataError: names or shapes are not those of the parameters."""
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        if problem := mismatch(shapes_of(arrays), shapes):
            raise DataError(problem)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.tensor(arrays[name]))

    def fit(self, job: Job) -> tuple[dict[str, Array], float]:
        """Runs a job to its end, undisturbed; returns the trained arrays and the mean loss. Raises: DataError: it went wrong."""
        from edge_sdk.training.trainer import Trainer

        trainer = Trainer(self, job)
        while True:
            if isinstance(state := trainer.step(float("inf")), Done):
                return state.arrays, state.loss

    @contextmanager
    def training(self, dropout: float, seed: int) -> Iterator[None]:
        """Training mode with this dropout everywhere and a generator of its own; evaluation mode afterwards."""
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            for name in ("dropout_prob", "attention_dropout"):  # attention drops by a number, not by a module
                if hasattr(module, name):
                    setattr(module, name, dropout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model.train()
            try:
                yield
            finally:
                self.model.eval()

    def accumulate(self, rows: Sequence[tuple[Row, float]]) -> float:
        """Adds the gradient of a few rows' weighted losses; returns the weighted loss."""
        weights = torch.tensor([weight for _, weight in rows])
        loss = weights @ self.losses([row for row, _ in rows])
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return float(loss.detach())

    def losses(self, rows: Sequence[Row]) -> Tensor:
        """The loss of each row, (n,): over classes, or the mean over the tokens of its answer."""
        hidden, mask = self._states([row.ids for row in rows], [_start(row) for row in rows])
        found: list[Tensor] = [hidden.new_zeros(())] * len(rows)
        graded = [i for i, row in enumerate(rows) if isinstance(row.target, Label | Guess | Classes)]
        if graded:
            scores = self._scores(hidden[graded], mask[graded])
            for i, value in zip(graded, _over_classes(scores, [rows[i] for i in graded]), strict=True):
                found[i] = value
        for i, row in enumerate(rows):
            if isinstance(row.target, Answer | TopTokens):
                found[i] = losses.answer(hidden[i], self._words(), row.ids, row.target).mean()
        return torch.stack(found)

    def class_scores(self, sequences: Sequence[Ids]) -> Tensor:
        """Class scores (n, n_classes) of prompts; differentiable. Raises: DataError: the task has no classes."""
        return self._scores(*self._states(sequences, [len(ids) - 1 for ids in sequences]))

    def token_scores(self, sequences: Sequence[Ids], starts: Sequence[int]) -> Tensor:
        """Scores of every token of the vocabulary at each position from `starts` on, all sequences' one after the other,
        (tokens, V); differentiable. Raises: DataError: the task's answers are classes."""
        vocabulary = self._words()
        hidden, _ = self._states(sequences, [start - 1 for start in starts])
        rows = zip(hidden, sequences, starts, strict=True)
        return torch.cat([states[start - 1 : len(ids) - 1] for states, ids, start in rows]) @ vocabulary.T

    def _words(self) -> Tensor:
        if self._vocabulary is None:
            raise DataError("this learner has no vocabulary, so it cannot train on answers; the task has classes")
        return self._vocabulary

    @torch.no_grad()
    def scores(self, texts: Sequence[str], batch_size: int = 32) -> NDArray[np.float32]:
        """Class scores (n, n_classes) of the model as it stands."""
        sequences = self.encoder.prompts(texts)
        found: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(sequences)
        for batch in by_length(sequences, batch_size):
            starts = [len(sequences[i]) - 1 for i in batch]
            rows = self._scores(*self._states([sequences[i] for i in batch], starts)).numpy()
            for i, row in zip(batch, rows, strict=True):
                found[i] = row
        return np.stack(found)

    def _scores(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self._head is None:
            raise DataError("this task has no classes; its answers are text")
        rows, scale = self._head
        return scale * pooled(hidden, mask, self._kind) @ rows.T


def pooled(hidden: Tensor, mask: Tensor, kind: Kind) -> Tensor:
    """The readout (n, width) of hidden states (n, longest, width): the decoder's last position, the encoder's unit mean."""
    if kind == "decoder":
        return hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
    weights = mask[:, :, None].to(hidden.dtype)
    return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)


def _start(row: Row) -> int:
    """The first position whose hidden state the row's loss reads."""
    if isinstance(row.target, Answer | TopTokens):
        return row.target.start - 1
    return len(row.ids) - 1


def _from(starts: Sequence[int], mask: Tensor) -> Tensor:
    """Which positions (n, longest) lie at or after their row's start and are no padding."""
    return (torch.arange(mask.shape[1]) >= torch.tensor(starts)[:, None]) & mask.bool()


def readout(model: Any, kind: Kind, sequences: Sequence[Ids]) -> Tensor:
    """What a whole model makes of each sequence, (n, width)."""
    return pooled(*base.whole_states(model, kind, sequences), kind)


def _over_classes(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """Losses (n,) of class scores (n, n_classes), each by its own kind of target."""
    found: list[Tensor] = [scores.new_zeros(())] * len(rows)
    for kind in (Label, Guess, Classes):
        group = [(i, row.target) for i, row in enumerate(rows) if isinstance(row.target, kind)]
        if not group:
            continue
        own, targets = scores[[i for i, _ in group]], [target for _, target in group]
        labels = [t.index for t in targets if isinstance(t, Label)]
        guesses = [t for t in targets if isinstance(t, Guess)]
        if labels:
            values = losses.hard(own, torch.tensor(labels))
        elif guesses:
            teacher = torch.from_numpy(np.stack([g.scores for g in guesses]))
            values = losses.soft(own, teacher, torch.tensor([[g.temperature] for g in guesses]))
        else:
            values = losses.classes(own, torch.from_numpy(np.stack([t.probabilities for t in targets if isinstance(t, Classes)])))
        for (i, _), value in zip(group, values, strict=True):
            found[i] = value
    return torch.stack(found)


def _whole(model: nn.Module, kind: Kind) -> States:
    return lambda sequences, _: base.whole_states(model, kind, sequences)


def _identity(
    way: str, bundle: Bundle, head: Head | None, spec: AdapterSpec | None = None, layers: int = 0, trunk: str = ""
) -> str:
    """A digest of what makes a learner: the base, the class rows, what is trained of it and what lies below."""
    digest = hashlib.sha256(msgspec.json.encode((way, bundle.sha256, spec, layers, trunk)))
    if head is not None:
        digest.update(f"\n{head.rows.shape} {head.scale!r} ".encode() + head.rows.tobytes())
    return digest.hexdigest()


def _prepare(threads: int) -> None:
    """Sets torch's threads, and lets it take oneDNN's matrix kernels, which may round to bfloat16 on processors made for it.

    A third less time for a step, the same accuracy (docs/LOG.md). A device labels and measures with the engine.
    """
    base.quiet()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("medium")


def _with_lora(model: nn.Module, spec: AdapterSpec, name: Callable[[str], str]) -> nn.Module:
    """Freezes `model` and puts LoRA into the slots of `spec`, called `name(module)` there."""
    from peft import LoraConfig, get_peft_model

    whole: Any = model  # any transformers model will do
    alpha: Any = spec.alpha  # PEFT says int and takes a float
    modules = [name(slot.module) for slot in spec.slots]
    config = LoraConfig(r=spec.rank, lora_alpha=alpha, target_modules=modules, lora_dropout=0.1)  # `training` sets it
    made: nn.Module = get_peft_model(whole, config)
    found = sum(".lora_A." in parameter for parameter, _ in made.named_parameters())
    if found != len(modules):
        raise DataError(f"the training model has {found} of the {len(modules)} layers that carry LoRA")
    return made


def _wire_name(name: str) -> str:
    """PEFT's parameter name in a live model -> its name in a file (the adapter's own name is dropped)."""
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")
