"""How many layers a device trains, and what that costs: arithmetic over the bundle's description, no measuring, no torch.

docs/training.md sets these formulas beside measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from edge_sdk.bundle import Bundle, layer_file
from edge_sdk.errors import DataError, SettingsError
from edge_sdk.protocol import Manifest

READING = 100_000_000  # bytes of a process that has imported onnxruntime, numpy and the tokenizer, and reads a batch
LIBRARIES = 560_000_000  # the same with torch, transformers and peft in its place, and what the allocator does not give back
ENGINE = 2.3  # bytes of an engine for each byte of its file: weights as they are and as they are multiplied
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

    Args:
        variant: of the engine that computes the trunk.
        tokens: in memory at a time.
    """
    weights = sum(_weights(bundle, i) for i in range(bundle.layers - layers, bundle.layers))
    frozen = sum(_weights(bundle, i) for i in range(bundle.layers - layers))
    vocabulary = bundle.files["vocabulary.safetensors"].size * 2 if answers else 0
    reading = READING + ENGINE * bundle.files[bundle.trunk(variant).file].size  # the engine is gone when torch comes
    training = LIBRARIES + 4 * weights + vocabulary + 4 * ACTIVATIONS * bundle.width * layers * tokens
    return Cost(round(max(reading, training)), 4 * weights, 2 * frozen, 2 * bundle.width)


def choose(manifest: Manifest, limits: Limits, variant: str, gflops: float) -> tuple[int, int]:
    """Layers and rank within what the run allows: the most layers that fit the memory, and whose micro-batch fits a step.

    Args:
        gflops: of this device, `conditions.gflops()`.

    Raises:
        DataError: the run does not allow the device's own choice, the bundle cannot serve it, or not even the fewest layers fit
            the memory.
    """
    spec, task = manifest.adapter, manifest.task
    if limits.layers or not manifest.min_layers:
        part = manifest.part(limits.layers, limits.rank)
        _served(manifest, part.depth)
        return part.depth, part.rank
    longest = min(task.max_tokens + task.answer_tokens + 16, manifest.bundle.positions)  # 16 for a pattern of usual length
    tokens = max(limits.micro_tokens, longest)
    fewest, rank = manifest.min_layers, manifest.part(0, limits.rank).rank

    def taken(layers: int) -> Cost:
        held = _served(manifest, layers)
        return cost(manifest.bundle, variant, held, tokens, bool(task.answer_tokens))

    for layers in range(spec.depth, fewest - 1, -1):
        needs = taken(layers)
        seconds = needs.operations * tokens / (EFFICIENCY * gflops * 1e9)
        fits = not limits.memory_mb or needs.memory <= limits.memory_mb * 1e6
        if fits and (seconds <= limits.step_seconds or layers == fewest):
            return layers, rank
    raise DataError(
        f"training {fewest} layers, the fewest this run allows, takes about {taken(fewest).memory / 1e6:.0f} MB; this device"
        f" allows {limits.memory_mb} (--memory-mb). Lower --micro-tokens, or take part without training"
    )


def split(manifest: Manifest, layers: int) -> int:
    """The lowest layer that torch holds when the `layers` highest layers of the adapter are trained."""
    return max(slot.layer for slot in manifest.adapter.slots) + 1 - layers


def _served(manifest: Manifest, layers: int) -> int:
    """How many layers torch holds. Raises: DataError: the bundle does not have their weights."""
    held = manifest.bundle.layers - split(manifest, layers)
    manifest.bundle.trains(held, bool(manifest.task.answer_tokens))
    return held


def _weights(bundle: Bundle, layer: int) -> int:
    """Weights of a layer, from the size of its float16 file."""
    file = bundle.files.get(layer_file(layer))
    return file.size // 2 if file else 0
