"""How many layers a device trains, and what that costs: arithmetic over the bundle's description, no measuring, no torch.

docs/training.md sets these formulas beside measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from edge_sdk.bundle import VOCABULARY, Bundle, layer_file
from edge_sdk.errors import DataError, SettingsError
from edge_sdk.protocol import Manifest

LIBRARIES = 560_000_000  # bytes of a process that has imported torch, transformers and peft, and what its allocator keeps
ENGINE = 2.3  # bytes of an engine for each byte of its file: weights as they are and as they are multiplied
READING, READ = 40, 512  # floats in an engine for each token it reads at a time and unit of width; that many, or one longer text
ACTIVATIONS = 24  # floats kept for the backward pass, for each token, layer and unit of width
EFFICIENCY = 0.6  # share of the speed of plain matrix products that a training step reaches


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device is willing to spend on training.

    Args:
        layers: how many layers nearest the output it trains; 0 to choose the most that memory and speed allow.
        rank: how many components; 0 for all.
        memory_mb: of the whole process; 0 for no limit.
        step_seconds: how long one small step may take; training is kept on disk after each.
        cache_mb: disk for hidden states; what does not fit is computed every time.
        micro_tokens: tokens in memory at a time, with which the gradient of a step is gathered; a longer text stands alone.
    """

    layers: int = 0
    rank: int = 0
    memory_mb: int = 0
    step_seconds: float = 10.0
    cache_mb: int = 1024
    micro_tokens: int = 512

    def __post_init__(self) -> None:
        if min(self.layers, self.rank, self.memory_mb, self.cache_mb) < 0 or not 1 <= self.micro_tokens <= 1 << 20:
            raise SettingsError("layers, rank, memory_mb and cache_mb must not be negative, micro_tokens between 1 and 2^20")
        if not 0 < self.step_seconds < math.inf:
            raise SettingsError("step_seconds must be positive and finite")


@dataclass(frozen=True)
class Cost:
    """What training the top layers takes.

    Args:
        memory: bytes of the process at its peak.
        operations: of one pass over one token, forward and backward.
        trunk: operations of the frozen layers, once for each token.
        cached: bytes on disk for each token.
    """

    memory: int
    operations: int
    trunk: int
    cached: int


def cost(bundle: Bundle, variant: str, layers: int, tokens: int, answers: bool = False) -> Cost:
    """The arithmetic: 2 operations for each weight forward, 2 more backward, since no frozen weight needs a gradient.

    Memory is the larger of two phases that follow each other: the engine reads texts (torch stays imported after a device's first
    training), or torch trains the layers. With answers, every token in memory may be one, and has a row of the vocabulary's size,
    kept once and needed once more backward.

    Args:
        variant: of the engine that computes the trunk.
        tokens: in memory at a time.
    """
    weights = sum(_weights(bundle, i) for i in range(bundle.layers - layers, bundle.layers))
    frozen = sum(_weights(bundle, i) for i in range(bundle.layers - layers))
    words = bundle.files[VOCABULARY].size // 2 if answers else 0  # weights of the output embeddings
    reading = ENGINE * bundle.files[bundle.trunk(variant).file].size + 4 * READING * bundle.width * max(tokens, READ)
    training = 4 * (weights + words) + 4 * ACTIVATIONS * bundle.width * layers * tokens + 2 * 4 * tokens * words // bundle.width
    return Cost(round(LIBRARIES + max(reading, training)), 4 * (weights + words), 2 * frozen, 2 * bundle.width)


def choose(manifest: Manifest, limits: Limits, variant: str, gflops: float) -> tuple[int, int]:
    """Layers and rank within what the run allows: the most layers that fit the memory, and whose micro-batch fits a step.

    A run without a choice, or a device that names its layers, gets these, if they fit the memory.

    Args:
        gflops: of this device with the threads it trains with, `conditions.gflops()`.

    Raises:
        DataError: the run does not allow the device's own choice, the bundle cannot serve it, or not even the fewest layers fit
            the memory.
    """
    spec, task, bundle = manifest.adapter, manifest.task, manifest.bundle
    named = manifest.part(limits.layers, limits.rank) if limits.layers or not manifest.min_layers else None
    most, fewest = (named.depth, named.depth) if named else (spec.depth, manifest.min_layers)
    rank = named.rank if named else manifest.part(0, limits.rank).rank
    longest = min(task.max_tokens + task.answer_tokens + 16, bundle.positions)  # 16 for a pattern of usual length
    tokens, answers = max(limits.micro_tokens, longest), bool(task.answer_tokens)

    def held(layers: int) -> int:
        return bundle.layers - split(manifest, layers)

    bundle.trains(held(fewest), answers)  # or it cannot be done at all
    for layers in range(most, fewest - 1, -1):
        if not all(layer_file(i) in bundle.files for i in range(bundle.layers - held(layers), bundle.layers)):
            continue
        needs = cost(bundle, variant, held(layers), tokens, answers)
        seconds = needs.operations * tokens / (EFFICIENCY * gflops * 1e9)
        fits = not limits.memory_mb or needs.memory <= limits.memory_mb * 1e6
        if fits and (seconds <= limits.step_seconds or layers == fewest):
            return layers, rank
    needed = cost(bundle, variant, held(fewest), tokens, answers).memory / 1e6
    raise DataError(
        f"training {fewest} layers, the fewest this run allows, takes about {needed:.0f} MB; this device"
        f" allows {limits.memory_mb} (--memory-mb). Lower --micro-tokens, or take part without training"
    )


def split(manifest: Manifest, layers: int) -> int:
    """The lowest layer that torch holds when the `layers` highest layers of the adapter are trained."""
    return max(slot.layer for slot in manifest.adapter.slots) + 1 - layers


def _weights(bundle: Bundle, layer: int) -> int:
    """Weights of a layer, from the size of its float16 file."""
    file = bundle.files.get(layer_file(layer))
    return file.size // 2 if file else 0
