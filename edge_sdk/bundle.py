"""A bundle: one folder with everything a device needs to run a model, described by its `bundle.json`.

`edge_export` writes bundles, devices download and verify them. A bundle holds one or more variants of the same model (int8
for ONNX Runtime, q8_0 for llama.cpp, ...); a device fetches the tokenizer and the one variant it runs. For training it holds
the original weights, layer by layer in float16; a device fetches the top layers that it trains, never the whole model.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

import msgspec

from edge_sdk.adapters import Slot
from edge_sdk.errors import AssetError, DataError, SettingsError
from edge_sdk.tasks import Kind, Task

SCHEMA = 5
NAME = "bundle.json"
TOKENIZER = "tokenizer.json"
CONFIG = "config.json"  # transformers' description of the model, for training
FINAL = "final.safetensors"  # what follows the last layer (a decoder's norm), for training
VOCABULARY = "vocabulary.safetensors"  # a decoder's output embeddings, for training on answers
Runtime = Literal["onnxruntime", "llama.cpp"]


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """sha256 in lower-case hex, size in bytes."""

    sha256: str
    size: int


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file that runs the model.

    Args:
        name: `int8`, `fp32`, `q8_0`, ...
        runtime: what runs it.
        minimum: oldest version of the runtime that can; for llama.cpp that of llama-cpp-python.
        file: its name in the bundle.
        r: Pearson correlation of its class scores with those of the fp32 model, on the exporter's probe set.
        kl: mean KL divergence of its class probabilities from fp32's, in nats.
    """

    name: str
    runtime: Runtime
    minimum: str
    file: str
    r: float
    kl: float


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `bundle.json` says.

    Args:
        schema: version of this description.
        kind: `decoder` (read out at the last position) or `encoder` (read out as the unit-length mean).
        base: asset reference of the original weights, which training loads; see `assets.py`.
        base_sha256: of the base's download; None for a local path or a hub model.
        license: SPDX identifier of the base, or `unknown`.
        parameters: how many weights the base has; uploads are compared with it.
        width: length of a readout.
        layers: how many transformer layers the base has. What enters layer i is the output `hidden.i` of its graphs.
        positions: longest sequence the base can read, in tokens.
        prefix: token ids that start every sequence; suffix: those that end it.
        slots: linear layers that can carry LoRA.
        task: what the bundle answers unless a server says otherwise.
        end: token ids that end a generated text.
        label_ids: decoder: token ids of each class's label word, as this tokenizer has them; empty for an encoder.
        variants: what can run, the recommended one first.
        files: name -> size and hash of every other file of the folder.
        sha256: of this description as compact JSON with this field empty; "" where nobody sealed it.
    """

    schema: int
    kind: Kind
    base: str
    base_sha256: str | None
    license: str
    parameters: int
    width: int
    layers: int
    positions: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    end: tuple[int, ...]
    slots: tuple[Slot, ...]
    task: Task
    label_ids: tuple[tuple[int, ...], ...]
    variants: tuple[Variant, ...]
    files: dict[str, File]
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise SettingsError(f"bundle schema {self.schema} is not {SCHEMA}; export the bundle again with this version")
        for name in self.files:
            if name != Path(name).name or name in ("", ".", "..", NAME):
                raise SettingsError(f"bundle file name {name!r} must be a plain file name")
        if self.variants and TOKENIZER not in self.files:
            raise SettingsError(f"the bundle has variants but no {TOKENIZER}")
        for variant in self.variants:
            if variant.file not in self.files:
                raise SettingsError(f"variant {variant.name!r} names {variant.file!r}, which is not a file of the bundle")

    def variant(self, name: str = "") -> Variant:
        """The variant of that name, the recommended one where none is given.

        Raises:
            SettingsError: there is none.
        """
        for variant in self.variants:
            if name in ("", variant.name):
                return variant
        known = ", ".join(v.name for v in self.variants) or "none"
        raise SettingsError(f"the bundle has no variant {name!r}; it has: {known}")

    def needs(self, name: str = "") -> dict[str, File]:
        """The files a device needs to run a variant."""
        wanted = (TOKENIZER, self.variant(name).file)
        return {file: self.files[file] for file in wanted}

    def trunk(self, name: str = "") -> Variant:
        """The variant that computes what enters the trained layers: the one of that name, or else the first that can.

        Raises:
            DataError: no variant runs in ONNX Runtime. SettingsError: there is no variant of that name.
        """
        for variant in (self.variant(name), *self.variants):
            if variant.runtime == "onnxruntime":
                return variant
        raise DataError("no variant of this bundle runs in ONNX Runtime, which training needs; export it with int8 too")

    def trains(self, top_layers: int, answers: bool = False) -> dict[str, File]:
        """The files a device needs beside those of `needs` to train the layers nearest the output.

        Args:
            answers: the loss is over the whole vocabulary, not over label words.

        Raises:
            DataError: the bundle has not that many layers, or does not hold their weights.
        """
        if not 1 <= top_layers <= self.layers:
            raise DataError(f"this model has {self.layers} layers; {top_layers} of them cannot be trained")
        wanted = [CONFIG, FINAL, *(layer_file(i) for i in range(self.layers - top_layers, self.layers))]
        wanted += [VOCABULARY] if answers else []
        if missing := [name for name in wanted if name not in self.files]:
            raise DataError(f"the bundle holds no {missing[0]}, so it cannot be trained; export it again")
        return {name: self.files[name] for name in wanted}

    @property
    def layers_path(self) -> str:
        """Module path of the list of layers, `model.layers` or `encoder.layer`; "" where there is no slot to tell it."""
        parts = self.slots[0].module.split(".") if self.slots else []
        numbers = [at for at, part in enumerate(parts) if part.isdigit()]
        return ".".join(parts[: numbers[0]]) if numbers else ""

    def pick(self, modules: tuple[str, ...], top_layers: int = 0) -> tuple[Slot, ...]:
        """The slots whose module ends in one of `modules` ("q_proj", "self.query"), all slots where none is named.

        Args:
            top_layers: only slots of this many layers nearest the output; 0 for every layer.

        Raises:
            SettingsError: a name matches no slot.
        """
        for wanted in modules:
            if not any(slot.module.endswith(f".{wanted}") for slot in self.slots):
                known = sorted({slot.module.rsplit(".", 1)[-1] for slot in self.slots})
                raise SettingsError(f"the bundle has no layer named {wanted!r}; it has: {', '.join(known)}")
        named = tuple(s for s in self.slots if not modules or any(s.module.endswith(f".{m}") for m in modules))
        if not top_layers:
            return named
        lowest = max(slot.layer for slot in named) - top_layers
        return tuple(slot for slot in named if slot.layer > lowest)


def layer_file(layer: int) -> str:
    """Name of the file with the weights of one layer, named relative to the layer, float16."""
    return f"layer.{layer:03d}.safetensors"


class _Schema(msgspec.Struct):
    """The one field that every version of a description has."""

    schema: int


def seal(bundle: Bundle) -> Bundle:
    """The same description with its own hash."""
    bare = msgspec.structs.replace(bundle, sha256="")
    return msgspec.structs.replace(bundle, sha256=hashlib.sha256(msgspec.json.encode(bare)).hexdigest())


def write(folder: Path, bundle: Bundle) -> None:
    """Writes `bundle.json`, sealed."""
    (folder / NAME).write_bytes(msgspec.json.format(msgspec.json.encode(seal(bundle)), indent=1) + b"\n")


def read(folder: Path) -> Bundle:
    """Raises: AssetError: there is no readable `bundle.json`, or it is damaged. SettingsError: it is of another schema."""
    try:
        body = (folder / NAME).read_bytes()
        found = msgspec.json.decode(body, type=_Schema).schema
        if found != SCHEMA:
            raise SettingsError(f"bundle schema {found} is not {SCHEMA}; export the bundle again with this version")
        bundle = msgspec.json.decode(body, type=Bundle)
        if bundle.sha256 != seal(bundle).sha256:
            raise AssetError(f"{folder / NAME} is damaged: its contents do not fit their own hash; fetch the bundle again")
        return bundle
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AssetError(f"{folder} is not a bundle ({error}); make one with `edge-export bundle`") from error


def digest(path: Path) -> File:
    """Size and sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return File(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def verify(folder: Path, files: dict[str, File]) -> None:
    """Raises: AssetError: a file is missing, truncated or changed."""
    for name, expected in files.items():
        if not intact(folder / name, expected):
            raise AssetError(f"{folder / name} is missing or damaged; delete {folder} and fetch it again")


def intact(path: Path, expected: File) -> bool:
    """Whether a file is there, whole and unchanged."""
    return path.is_file() and path.stat().st_size == expected.size and digest(path) == expected


def older(version: str, minimum: str) -> bool:
    """Whether version numbers such as `1.22.1` come before `1.23`."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in (re.findall(r"\d+", text) + ["0"] * 3)[:3]]

    return numbers(version) < numbers(minimum)
