"""A fleet without a network: the product's own device verbs and server step, called in one process.

What the server and the agents do over HTTP, `federate` does in a loop; tests/test_end_to_end.py holds the two against each
other. Baselines differ from LP-FL in one argument each, on the same text, steps and batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from edge_sdk import bundle as bundles
from edge_sdk import verbs
from edge_sdk.adapters import Adapter, AdapterSpec, Array, Arrays
from edge_sdk.assets import MODELS, cache_folder, resolve
from edge_sdk.engines import Engine, Scorer, TopK, open_engine
from edge_sdk.errors import DataError
from edge_sdk.protocol import Mix, Sample
from edge_sdk.tasks import Example, Private
from edge_sdk.tokens import Ids, PromptEncoder
from edge_server import settings as run_settings
from edge_server.aggregation import Contribution
from edge_server.systems import lpfl
from examples import icwsm

if TYPE_CHECKING:
    from edge_sdk.training.learner import Learner

Part = Literal["test", "validation"]
Split = Literal["iid", "by-domain"]
After = Callable[[int, Arrays], Arrays]  # a version's number and its mean -> what it becomes
Travels = Callable[[int, Arrays], Arrays]  # a device's place in the fleet and its update -> what arrives
CONFIGS = Path(__file__).parent.parent / "examples"


def bundle_of(slm: str, variants: tuple[str, ...] = ("int8", "fp32")) -> Path:
    """The exported bundle of a named model, made on first use and cached."""
    folder = cache_folder() / "exports" / f"{slm}-{bundles.SCHEMA}-{'-'.join(variants)}"
    if not (folder / bundles.NAME).exists():
        from edge_export.bundle import Recipe, make

        make(MODELS[slm], folder, Recipe(variants))
    return folder


def small_bundle(layers: int = 12) -> Path:
    """SmolLM2 with fewer layers, taught on validation texts without their labels: no device's text, and none of the test's."""
    folder = cache_folder() / "exports" / f"smollm2-{layers}-{bundles.SCHEMA}"
    if not (folder / bundles.NAME).exists():
        from edge_export import shrink
        from edge_export.bundle import Recipe

        shrink.make(MODELS["smollm2"], folder, shrink.Shrinking(layers), _public_texts(), Recipe(("fp32",)))
    return folder


def other_bundle(layers: int = 12, vocabulary: int = 4096) -> Path:
    """The same with a tokenizer of its own, made from the same texts."""
    folder = cache_folder() / "exports" / f"smollm2-{layers}-{vocabulary}-{bundles.SCHEMA}"
    if not (folder / bundles.NAME).exists():
        from edge_export import shrink
        from edge_export.bundle import Recipe

        how = shrink.Shrinking(layers, vocabulary=vocabulary)
        shrink.make(MODELS["smollm2"], folder, how, _public_texts(), Recipe(("fp32",)))
    return folder


def _public_texts() -> list[str]:
    return [example.text for domain in domains().values() for example in domain.validation]


@dataclass(frozen=True)
class Lab:
    """One model in all the forms the methods need."""

    settings: run_settings.RunSettings
    spec: AdapterSpec
    parameters: int
    engine: Engine
    lora: Learner
    folder: Path

    def full(self) -> tuple[TorchEngine, Learner]:
        """A second copy of the base with every weight trainable; labels with itself."""
        from edge_sdk.training.learner import Learner

        learner = Learner.full(bundles.read(self.folder), self.engine.head, self.engine.encoder)
        return TorchEngine(learner), learner


@dataclass(frozen=True)
class TorchEngine:
    """Scores with a learner's own weights: full-parameter training has no ONNX adapter slots."""

    learner: Learner

    @property
    def encoder(self) -> PromptEncoder:
        return self.learner.encoder

    end: int | None = None

    def answers(self, texts: Sequence[str]) -> list[Ids]:
        raise DataError("for classes only")

    def answer_top_k(self, texts: Sequence[str], answers: Sequence[str], k: int) -> list[TopK]:
        raise DataError("for classes only")

    def answer_logprobs(self, texts: Sequence[str], answers: Sequence[str]) -> list[NDArray[np.float32]]:
        raise DataError("for classes only")

    def set_adapter(self, adapter: Adapter | None) -> None:
        if adapter is not None:
            self.learner.set(adapter.arrays)

    def logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self.learner.scores(texts)


@cache
def lab(slm: str, threads: int = 1, layers: int = 0) -> Lab:
    """Loads a model once in a process; only the top `layers` learn, all for 0."""
    return open_lab(bundle_of(slm), run_settings.load(CONFIGS / f"{slm}.toml"), threads, layers)


def open_lab(folder: Path, settings: run_settings.RunSettings, threads: int = 1, layers: int = 0) -> Lab:
    """A bundle in the run that `settings` describes; only the top `layers` learn, all for 0."""
    bundle = bundles.read(folder)
    manifest = run_settings.manifest(settings, bundle)
    engine = open_engine(folder, bundle, settings.task, "fp32", threads)
    spec = manifest.adapter.part(layers or manifest.adapter.depth, manifest.adapter.rank)
    from edge_sdk.training.learner import Learner  # torch comes where it is needed

    learner = Learner.beside(engine, folder, bundle, spec, settings.task, threads)
    return Lab(settings, spec, bundle.parameters, engine, learner, folder)


@cache
def domains() -> dict[str, icwsm.Domain]:
    return icwsm.load(resolve(icwsm.ASSET))


def devices(split: Split, labels: int, unlabelled: int, held_out: int, part: Part, seed: int) -> list[Private]:
    """Four devices' private text: `labels` labelled (half of each class), `unlabelled` without, `held_out` of `part`.

    `by-domain` gives each device one domain, `iid` deals an equal mix of all domains to all devices.
    """
    rng = np.random.default_rng(seed)

    def shuffled(examples: Sequence[Example]) -> list[Example]:
        return [examples[i] for i in rng.permutation(len(examples))]

    train = [shuffled(domain.train) for domain in domains().values()]
    held = [shuffled(domain.test if part == "test" else domain.validation) for domain in domains().values()]
    if split == "iid":
        fair, fair_held = min(map(len, train)), min(map(len, held))
        mixed = shuffled([example for domain in train for example in domain[:fair]])
        mixed_held = shuffled([example for domain in held for example in domain[:fair_held]])
        train, held = [mixed[i::4] for i in range(4)], [mixed_held[i::4] for i in range(4)]
    return [_private(t, h[:held_out], labels, unlabelled) for t, h in zip(train, held, strict=True)]


def _private(train: Sequence[Example], held_out: Sequence[Example], labels: int, unlabelled: int) -> Private:
    chosen = {i for c in (0, 1) for i in [i for i, e in enumerate(train) if e.label == c][: labels // 2]}
    rest = [e for i, e in enumerate(train) if i not in chosen][:unlabelled]
    return Private(
        tuple(train[i] for i in sorted(chosen)), tuple(e.text for e in rest), tuple(e.label for e in rest), tuple(held_out)
    )


def share(examples: Sequence[Example], count: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The first `count` and the rest, half of each class in both."""
    of = [[e for e in examples if e.label == c] for c in (0, 1)]
    first, rest = (tuple(e for some in of for e in some[part]) for part in (slice(count // 2), slice(count // 2, None)))
    return first, rest


def federate(
    fleet: Sequence[Private],
    start: Arrays,
    spec: AdapterSpec,
    settings: lpfl.LpFl,
    engine: Scorer,
    trainer: verbs.Fits,
    synthetic: Sequence[Sample] = (),
    mix: Mix | None = None,
    after: After = lambda _, adapter: adapter,
    travels: Travels = lambda _, delta: delta,
) -> Arrays:
    """Synchronous rounds of a whole fleet; with one device, training alone.

    Args:
        after: what the server makes of each version's mean.
        travels: what the server gets of each device's update.
    """
    adapter = start
    for version in range(settings.versions):
        seed = settings.seed + 1 + version
        buffer = []
        for at, private in enumerate(fleet):
            prepared = verbs.prepare(
                version, adapter, spec, private, settings.training, settings.soft, seed, engine, None, synthetic, mix
            )
            learned = prepared.learned(*trainer.fit(prepared.job))
            buffer.append(Contribution(travels(at, learned.delta), learned.num_examples, 0, adapter))
        adapter = after(version, lpfl.step(settings, spec, adapter, buffer))
    return adapter


def accuracies(adapter: Arrays, spec: AdapterSpec, fleet: Sequence[Private], engine: Scorer) -> list[float]:
    """Each device's accuracy on its held-out text."""
    return [verbs.evaluate(adapter, spec, private, engine)[1]["accuracy"] for private in fleet]


def pooled(fleet: Sequence[Private]) -> Private:
    """All devices' labels in one place."""
    return Private(tuple(e for private in fleet for e in private.labelled), (), (), ())


def flatten(learner: Learner) -> dict[str, Array]:
    """The learner's weights as they stand, copied."""
    return {name: array.copy() for name, array in learner.get().items()}
