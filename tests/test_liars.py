"""One judge in four lies, with the real models: what devices learn in the end is at most a point and a half worse.

Judges alone, in both forms and with one of them late, are in `test_judging.py`.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from bench import crosslm, fleet, mutual
from edge_sdk.assets import MODELS, resolve
from edge_sdk.judgments import Bytes
from edge_server.llm.jobs import Hello
from edge_server.systems.crosslm import CrossLm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
Lie = Callable[[Bytes], Bytes]
LIES: dict[str, Lie] = {
    "random": lambda answer: np.random.default_rng(0).integers(0, 256, answer.shape, np.uint8),
    "inverted": lambda answer: np.ascontiguousarray(answer[:, ::-1]),
    "inverted, and sure": lambda answer: (255 * np.eye(2, dtype=np.uint8))[1 - answer.argmax(1)],
    "constant": lambda answer: np.tile(np.array([0, 255], np.uint8), (len(answer), 1)),
}


def settings() -> CrossLm:
    """One sheet, from which the LLM itself learns nothing: it would write the same either way."""
    run = crosslm.settings_of(0)
    tuning = msgspec.structs.replace(run.tuning, generation=0.0, contrast_weight=0.0, task=0.0)
    training = msgspec.structs.replace(run.training, steps=16)
    return msgspec.structs.replace(run, versions=1, samples=96, tuning=tuning, training=training)


@pytest.fixture(scope="module")
def learn(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Lie | None], tuple[float, int]]:
    """Runs four devices, of which the first may lie: mean accuracy in the end, and how many texts were accepted."""
    from edge_server.llm.model import Llm

    run, task, lab = settings(), crosslm.run_file().task, fleet.lab("minilm")
    model, folder = resolve(MODELS[run.llm.model]), tmp_path_factory.mktemp("liars")
    here = mutual.Here(Llm(model, task, run.llm), Hello(str(model), task, run.llm), folder)
    private = fleet.devices("by-domain", 16, 0, 240, "validation", 0)
    devices = mutual.Devices(private, lab.spec, lab.engine, lab.lora)

    async def last(lie: Lie | None) -> mutual.Version:
        told = None if lie is None else lambda k, answer: lie(answer) if k == 0 else answer
        start = lab.spec.start(0)
        found = [v async for v in mutual.versions(devices, start, run, task, here, folder, lab.engine.embed, told)]
        return found[-1]

    def ended(lie: Lie | None) -> tuple[float, int]:
        version = asyncio.run(last(lie))
        pairs = zip(version.own, private, strict=True)
        right = [fleet.accuracies(own, lab.spec, [device], lab.engine)[0] for own, device in pairs]
        return statistics.fmean(right), len(version.feed)

    return ended


@pytest.fixture(scope="module")
def honest(learn: Callable[[Lie | None], tuple[float, int]]) -> tuple[float, int]:
    return learn(None)


@pytest.mark.parametrize("kind", LIES)
def test_a_liar_among_four_costs_at_most_a_point_and_a_half(
    kind: str, honest: tuple[float, int], learn: Callable[[Lie | None], tuple[float, int]]
) -> None:
    """Mean accuracy of all four devices after learning from what was accepted; four fifths as many texts are, or more."""
    accuracy, accepted = learn(LIES[kind])

    assert honest[0] > 0.75
    assert accuracy >= honest[0] - 0.015
    assert accepted >= 0.8 * honest[1]
