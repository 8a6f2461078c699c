"""What a device does when it is asked: `train` and `evaluate`, as functions of the work, the adapter and private data.

LP-FL's device side (Jiang, Liu & Fan 2023, reconstruction in docs/systems/lpfl.md) is `train`: label with the fresh global
adapter, choose, learn from few labels and many soft ones. bench/lpfl.py runs these same functions without a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_sdk import softlabels
from edge_sdk.adapters import Adapter, AdapterSpec, Array, Arrays, subtract
from edge_sdk.engines import Scorer
from edge_sdk.errors import DataError
from edge_sdk.protocol import Metrics
from edge_sdk.softlabels import SoftLabels, SoftSet
from edge_sdk.tasks import Example, Private, accuracy
from edge_sdk.training.batches import Training


class Trainer(Protocol):
    """Turns start arrays and examples into trained arrays; `edge_sdk.training.learner.Learner` with its tokenizer."""

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
        """Returns the trained arrays and the mean loss."""
        ...


@dataclass(frozen=True)
class Learned:
    """What came of one `Train`: trained - start, how many examples it rests on, and numbers worth telling."""

    delta: dict[str, Array]
    num_examples: int
    metrics: Metrics


def train(
    version: int,
    start: Arrays,
    spec: AdapterSpec,
    private: Private,
    training: Training,
    soft: SoftLabels | None,
    seed: int,
    engine: Scorer,
    trainer: Trainer,
) -> Learned:
    """Learns from private data, starting at the global adapter of `version`.

    Raises:
        DataError: no labelled text, or training went wrong; nothing is sent then.
    """
    if not private.labelled:
        raise DataError("this device has no labelled text; add some with `edge-agent add`")
    chosen: SoftSet | None = None
    metrics: Metrics = {}
    if soft is not None and (count := softlabels.size(soft, version, len(private.unlabelled))):
        engine.set_adapter(Adapter(start, spec))
        chosen = softlabels.choose(engine.logits(private.unlabelled), count)
        metrics = _about(chosen, private.truths)
    rng = np.random.default_rng(seed)
    trained, loss = trainer.fit(start, private.labelled, private.unlabelled, chosen, training, soft, rng)
    used = len(private.labelled) + (len(chosen) if chosen is not None else 0)
    return Learned(subtract(trained, start), used, {"loss": loss, **metrics})


def evaluate(adapter: Arrays, spec: AdapterSpec, private: Private, engine: Scorer) -> tuple[int, Metrics]:
    """How many held-out examples there are, and the accuracy on them (absent where there are none)."""
    if not private.held_out:
        return 0, {}
    engine.set_adapter(Adapter(adapter, spec))
    scores: NDArray[np.float32] = engine.logits([e.text for e in private.held_out])
    labels = [e.label for e in private.held_out if e.label is not None]
    return len(labels), {"accuracy": accuracy(scores, labels)}


def _about(chosen: SoftSet, truths: Sequence[int | None]) -> Metrics:
    """Size of the soft set and, where truths are known, the share of its labels that are right."""
    known = [(int(scores.argmax()), truths[i]) for i, scores in zip(chosen.indices, chosen.scores, strict=True)]
    hits = [predicted == truth for predicted, truth in known if truth is not None]
    right = {"soft_accuracy": float(np.mean(hits))} if hits else {}
    return {"soft_examples": float(len(chosen)), **right}
