"""LoRA adapters as named float32 arrays: shapes, start values, deltas, and the PEFT directory.

Names are PEFT's (`base_model.model.<module>.lora_A.weight`, shape (rank, in); `.lora_B.weight`, shape (out, rank)), so
what travels is what `peft.PeftModel.from_pretrained` loads. No torch here, and no sockets; `wire.py` turns arrays into
bytes and back. Source: Hu et al. 2021, "LoRA", section 4.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import load

from edge_sdk.errors import DataError

T = TypeVar("T", bound=np.generic)
Array = NDArray[np.float32]
Arrays = Mapping[str, Array]

PREFIX = "base_model.model."
ADAPTER_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # of a PEFT directory


class Slot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A linear layer of the base model that can carry LoRA: y = W x with W of shape (out_features, in_features)."""

    module: str
    in_features: int
    out_features: int

    @property
    def layer(self) -> int:
        """The first whole number in the module path: `model.layers.7.self_attn.q_proj` -> 7; -1 where there is none."""
        return next((int(part) for part in self.module.split(".") if part.isdigit()), -1)

    @property
    def a(self) -> str:
        return f"{PREFIX}{self.module}.lora_A.weight"

    @property
    def b(self) -> str:
        return f"{PREFIX}{self.module}.lora_B.weight"


class AdapterSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which slots an adapter fills, at which rank; y = W x + (alpha / rank) B A x.

    With `freeze_a` only the B factors are trained and travel, and A stays what it was at the start: then the mean of products
    BA is the product of the mean. Source: Sun et al. 2024, "FFA-LoRA", section 4.
    """

    slots: tuple[Slot, ...]
    rank: int
    alpha: float
    freeze_a: bool = False

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Exact name -> shape of every array of such an adapter."""
        shapes: dict[str, tuple[int, ...]] = {}
        for slot in self.slots:
            shapes[slot.a] = (self.rank, slot.in_features)
            shapes[slot.b] = (slot.out_features, self.rank)
        return shapes

    def update_shapes(self) -> dict[str, tuple[int, ...]]:
        """Exact name -> shape of what is trained."""
        return {slot.b: (slot.out_features, self.rank) for slot in self.slots} if self.freeze_a else self.shapes()

    @property
    def depth(self) -> int:
        """How many layers there are from the lowest that has a slot to the highest that has one."""
        layers = [slot.layer for slot in self.slots]
        return max(layers) - min(layers) + 1 if layers else 0

    def part(self, layers: int, rank: int) -> AdapterSpec:
        """The slots of the `layers` highest layers, and the first `rank` components of each, on the same scale.

        Raises:
            DataError: there are not that many layers or components.
        """
        if not 1 <= layers <= self.depth or not 1 <= rank <= self.rank:
            raise DataError(f"an adapter of {self.depth} layers and rank {self.rank} has no part of {layers} and {rank}")
        lowest = max(slot.layer for slot in self.slots) - layers
        slots = tuple(slot for slot in self.slots if slot.layer > lowest)
        return AdapterSpec(slots, rank, self.alpha * rank / self.rank, self.freeze_a)

    def start(self, seed: int) -> dict[str, Array]:
        """The adapter every fleet starts from: A uniform in ±1/sqrt(in) (PEFT's default), B zero, so it changes nothing."""
        rng = np.random.default_rng(seed)
        arrays: dict[str, Array] = {}
        for slot in self.slots:
            bound = 1.0 / math.sqrt(slot.in_features)
            arrays[slot.a] = rng.uniform(-bound, bound, (self.rank, slot.in_features)).astype(np.float32)
            arrays[slot.b] = np.zeros((slot.out_features, self.rank), np.float32)
        return arrays


class Adapter(NamedTuple):
    """Arrays and what they are; what an engine wears."""

    arrays: Arrays
    spec: AdapterSpec


Shapes = Mapping[str, tuple[int, ...]]


def take(arrays: Arrays, part: AdapterSpec) -> dict[str, Array]:
    """What `part` covers of a larger adapter: the first rows of A and columns of B."""
    taken = {slot.a: arrays[slot.a][: part.rank] for slot in part.slots}
    return taken | {slot.b: arrays[slot.b][:, : part.rank] for slot in part.slots}


def below(arrays: Arrays, spec: AdapterSpec, layer: int) -> Adapter | None:
    """The part of an adapter in layers below `layer`; None where it changes nothing there."""
    slots = tuple(slot for slot in spec.slots if slot.layer < layer)
    if not any(arrays[slot.b].any() for slot in slots):
        return None
    lower = AdapterSpec(slots, spec.rank, spec.alpha, spec.freeze_a)
    return Adapter({name: arrays[name] for name in lower.shapes()}, lower)


def shapes_of(arrays: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def mismatch(found: Shapes, expected: Shapes) -> str | None:
    """Says in one sentence how found names and shapes differ from the expected ones; None where they do not."""
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    if missing or extra:
        parts = [f"{len(missing)} missing (first: {missing[0]})"] if missing else []
        parts += [f"{len(extra)} unexpected (first: {extra[0][:200]})"] if extra else []
        return "tensor names differ from the base model's adapter slots: " + ", ".join(parts)
    for name, shape in expected.items():
        if found[name] != shape:
            return f"{name} has shape {found[name]}, expected {shape}"
    return None


def not_finite(arrays: Arrays) -> str | None:
    """Name of the first array that holds NaN or infinity; None where there is none."""
    return next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)


def check(adapter: Adapter, slots: Iterable[Slot]) -> None:
    """Raises: DataError: the arrays do not fit their own spec, are not finite, or the spec does not fit a base with `slots`."""
    arrays, spec = adapter
    if spec.rank < 1 or not math.isfinite(spec.alpha):
        raise DataError(f"an adapter needs a rank of at least 1 and a finite alpha, not {spec.rank} and {spec.alpha}")
    if problem := mismatch(shapes_of(arrays), spec.shapes()):
        raise DataError(f"the adapter does not fit: {problem}")
    known = set(slots)
    if foreign := [slot.module for slot in spec.slots if slot not in known]:
        raise DataError(f"this bundle has no adapter slot for {foreign[0]}")
    if len(set(spec.slots)) < len(spec.slots):
        raise DataError("the adapter names a slot twice")
    if name := not_finite(arrays):
        raise DataError(f"the adapter holds NaN or infinity in {name}")


def subtract(a: Arrays, b: Arrays) -> dict[str, Array]:
    return {name: a[name] - b[name] for name in a}


def add(a: Arrays, b: Arrays, scale: float = 1.0) -> dict[str, Array]:
    """a + scale * b, in float32; what b lacks stays as it is, and where it is smaller it is zero beyond its end."""
    return {name: a[name] + np.float32(scale) * _fill(b[name], a[name].shape) if name in b else a[name] for name in a}


def weighted_mean(items: Iterable[tuple[Arrays, float]]) -> dict[str, Array]:
    """Sum of weight * arrays over the sum of weights, as a running float64 sum: memory does not grow with the count.

    Every name is averaged over the items that have it. Arrays of a smaller rank are zero beyond it.

    Raises:
        DataError: no item, or weights that do not sum to more than zero.
    """
    total: dict[str, NDArray[np.float64]] = {}
    weights: dict[str, float] = {}
    for arrays, weight in items:
        for name, array in arrays.items():
            scaled = np.multiply(array, weight, dtype=np.float64)
            if name not in total:
                total[name] = scaled
            elif total[name].shape == scaled.shape:
                total[name] += scaled
            else:
                shape = tuple(max(sizes) for sizes in zip(total[name].shape, scaled.shape, strict=True))
                total[name] = _fill(total[name], shape) + _fill(scaled, shape)
            weights[name] = weights.get(name, 0.0) + weight
    if not weights or min(weights.values()) <= 0:
        raise DataError("cannot average: the weights sum to zero")
    return {name: (array / weights[name]).astype(np.float32) for name, array in total.items()}


def _fill(array: NDArray[T], shape: tuple[int, ...]) -> NDArray[T]:
    """Zeros up to `shape`."""
    if array.shape == shape:
        return array
    return np.pad(array, [(0, size - own) for size, own in zip(shape, array.shape, strict=True)])


def row_major(arrays: Arrays) -> dict[str, Array]:
    """The same values, laid out row by row: safetensors writes memory as it lies, so a transposed view would be garbled."""
    return {name: np.asarray(array, np.float32, order="C") for name, array in arrays.items()}


def peft_config(spec: AdapterSpec, base: str) -> bytes:
    """The `CONFIG_FILE` with which PEFT loads the `ADAPTER_FILE` beside it onto the base model."""
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(slot.module for slot in spec.slots),
        "task_type": None,
        "inference_mode": True,
    }
    return (json.dumps(config, indent=2) + "\n").encode()


_PLAIN: dict[str, tuple[Any, ...]] = {  # what a device could not tell from the arrays
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "use_rslora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "modules_to_save": (None, []),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # others change the base too
}


def _load(path: Path) -> dict[str, NDArray[Any]]:
    """Arrays of a safetensors file; bfloat16, which numpy lacks, is the upper half of a float32."""
    with path.open("rb") as file:
        entries: Any = deserialize(file.read())  # type: ignore[no-untyped-call]
    if all(entry["dtype"] != "BF16" for _, entry in entries):
        arrays: dict[str, NDArray[Any]] = load(path.read_bytes())
        return arrays
    arrays = {}
    for name, entry in entries:
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']} among BF16 arrays")
        halves = np.frombuffer(entry["data"], "<u2").astype(np.uint32) << 16
        arrays[name] = halves.view(np.float32).reshape(entry["shape"])
    return arrays


def read_peft(folder: Path, slots: Iterable[Slot]) -> Adapter:
    """Reads a PEFT LoRA directory and checks it against the slots of a base model.

    Raises:
        DataError: no such files, not plain LoRA, or names and shapes that do not fit the base.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        for key, wanted in _PLAIN.items():
            if config.get(key, wanted[0]) not in wanted:
                raise DataError(f"{folder}: {key} is {config[key]!r}; only plain LoRA ({key}={wanted[0]!r}) is supported")
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        loaded = _load(folder / ADAPTER_FILE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DataError(f"{folder} is not a PEFT LoRA directory ({error!r})") from error
    arrays = {name: array.astype(np.float32) for name, array in loaded.items()}
    if name := not_finite(arrays):
        raise DataError(f"{folder} holds NaN or infinity in {name}")
    used = tuple(slot for slot in slots if slot.a in arrays)
    spec = AdapterSpec(slots=used, rank=rank, alpha=alpha)
    if problem := mismatch(shapes_of(arrays), spec.shapes()):
        raise DataError(f"{folder} does not fit this base model: {problem}")
    return Adapter(arrays, spec)
